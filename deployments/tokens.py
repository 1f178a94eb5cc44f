"""Text to ids by the Rust tokenizers, exactly as AutoTokenizer makes them. No torch.

The model side exports AutoTokenizer's backend once (`deployments.model.vocabulary`): importing
AutoTokenizer would bring torch into the ingress.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import tokenizers

from deployments.rows import Tokens

Input = str | tuple[str, str]


class Vocabulary(TypedDict):
    """A tokenizer as it travels from the model to the ingress.

    Attributes:
        backend: The Rust tokenizer as JSON, truncation and padding cleared.
        max_length: Most tokens that the base can take.
        truncation_side: Which end of a long text goes, `left` or `right`.
        split_special_tokens: Whether `[SEP]` in a text is text.
        type_ids: Whether the base reads segment ids.
    """

    backend: str
    max_length: int
    truncation_side: str
    split_special_tokens: bool
    type_ids: bool


class Encoded(NamedTuple):
    """One input's tokens.

    Attributes:
        tokens: What the base reads.
        num_tokens: Tokens of the whole input, before anything was cut.
    """

    tokens: Tokens
    num_tokens: int

    @property
    def truncated(self) -> bool:
        """Whether the end, or the start, of the input was cut."""
        return self.num_tokens > len(self.tokens.ids)


class Tokenizer:
    """Encodes texts and pairs; safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Build the Rust tokenizer from its JSON."""
        self._cut_left = vocabulary["truncation_side"] == "left"
        self._type_ids = vocabulary["type_ids"]
        self._backend = tokenizers.Tokenizer.from_str(vocabulary["backend"])
        self._backend.encode_special_tokens = vocabulary["split_special_tokens"]

    def encode(
        self, inputs: Sequence[Input], max_length: int, strategy: str | None = "longest_first"
    ) -> list[Encoded]:
        """Encode a batch.

        Args:
            inputs: Texts, or pairs of texts.
            max_length: Longest result in tokens, special tokens included.
            strategy: `longest_first`, `only_first` or `only_second` cut what is longer; None
                leaves it whole.

        Raises:
            ValueError: An input cannot be cut to `max_length` in this way.
        """
        results = []
        for encoding in self._backend.encode_batch_fast(inputs):
            ids, type_ids = encoding.ids, encoding.type_ids
            num_tokens = len(ids)
            if strategy is not None and num_tokens > max_length:
                kept = self._kept(encoding.sequence_ids, max_length, strategy)
                ids, type_ids = [ids[i] for i in kept], [type_ids[i] for i in kept]
            segments = type_ids if self._type_ids and any(type_ids) else None
            results.append(Encoded(Tokens(ids, segments), num_tokens))
        return results

    def _kept(
        self, sequences: Sequence[int | None], max_length: int, strategy: str
    ) -> Sequence[int]:
        """Return the indices of the tokens that a cut leaves.

        The Rust tokenizer's own truncation keeps every piece that it cuts off, for a pair every
        combination of them: memory for the square of what a caller sends.

        Args:
            sequences: For each token its text, 0 or 1, or None for a special token.
            max_length: Longest result, special tokens included.
            strategy: As `encode`.
        """
        texts = [[i for i, text in enumerate(sequences) if text == n] for n in (0, 1)]
        first, second = map(len, texts)
        room = max_length - (len(sequences) - first - second)
        if room < 0:
            return range(len(sequences))  # as the Rust tokenizer does; the caller sees its length
        left = room_for(first, second, room, strategy)
        if left is None:
            raise ValueError(f"cannot be cut to {max_length} tokens by {strategy}")
        dropped: set[int] = set()
        for indices, num_left in zip(texts, left, strict=True):
            num_gone = len(indices) - num_left
            dropped.update(indices[:num_gone] if self._cut_left else indices[num_left:])
        return [index for index in range(len(sequences)) if index not in dropped]


def room_for(first: int, second: int, room: int, strategy: str) -> tuple[int, int] | None:
    """Share `room` tokens among two texts (`truncate_encodings` of the tokenizers library).

    Returns:
        Tokens left of each text; None if the text to be cut would have none left.
    """
    if first + second <= room:
        return first, second
    if room == 0:
        return 0, 0
    if strategy == "only_first":
        return (room - second, second) if room > second else None
    if strategy == "only_second":
        return (first, room - first) if second and room > first else None
    shorter = min(first, second, room // 2)
    longer = room - shorter
    return (shorter, longer) if first <= second else (longer, shorter)
