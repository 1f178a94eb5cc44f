import pytest

from adapters.embedding import embedding_problem

PREFIX = "base_model.model."


@pytest.mark.parametrize(
    "name", ["bert.embeddings.word_embeddings.weight", "model.embed_tokens.weight", "wte.weight"]
)
def test_a_resized_embedding_says_both_sizes(name: str) -> None:
    assert embedding_problem(PREFIX + name, (30524, 384), 30522) == (
        "its embedding was resized to 30524 tokens, the base has 30522; train without new tokens"
    )
    whole = embedding_problem(PREFIX + name, (30522, 384), 30522)
    assert whole is not None
    assert "save_embedding_layers=False" in whole


@pytest.mark.parametrize(
    "name",
    [
        "bert.embeddings.position_embeddings.weight", "classifier.weight", "wte.bias", "weight", "",
        "bert.embeddings.word_embeddings.lora_A.weight", "wte",
    ],
)  # fmt: skip
def test_other_tensors_are_no_embedding(name: str) -> None:
    assert embedding_problem(PREFIX + name, (3, 4), 5) is None
    assert embedding_problem(name, (3, 4), 5) is None
