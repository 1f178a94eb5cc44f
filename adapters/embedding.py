"""Embeddings of tokens in an adapter's file. No torch."""

from __future__ import annotations

_NAMES = frozenset(("word_embeddings", "embed_tokens", "tok_embeddings", "wte"))


def embedding_problem(name: str, shape: tuple[int, ...], num_tokens: int) -> str | None:
    """Return a sentence if a stored tensor is an embedding of tokens, else None.

    PEFT writes the whole embedding beside the adapter where its size is not the base's
    (`save_embedding_layers="auto"`), as it is after `resize_token_embeddings`.

    Args:
        name: As PEFT stores it.
        shape: Of the stored tensor; [tokens, hidden] for an embedding.
        num_tokens: Rows of the base's embedding.
    """
    *path, leaf = name.split(".")
    if leaf != "weight" or _NAMES.isdisjoint(path[-1:]):
        return None
    if len(shape) == 2 and shape[0] != num_tokens:
        return (
            f"its embedding was resized to {shape[0]} tokens, the base has {num_tokens}; "
            "train without new tokens"
        )
    return (
        f"{name} is an embedding, which all tasks share; train without it, "
        "or save with save_embedding_layers=False if it was not trained"
    )
