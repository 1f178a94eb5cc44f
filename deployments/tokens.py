"""Text to ids by the Rust tokenizers, exactly as AutoTokenizer makes them. No torch.

The model side exports AutoTokenizer's backend once (`deployments.model.vocabulary`): importing
AutoTokenizer would bring torch into the ingress.
"""

from __future__ import annotations

import threading
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
        self._vocabulary = vocabulary
        self._whole = self._build()
        # Truncation is a setting of the tokenizer object, so inputs that need it go through a
        # second one, under a lock; it is built when the first of them comes.
        self._cutting: tokenizers.Tokenizer | None = None
        self._lock = threading.Lock()

    def _build(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self._vocabulary["backend"])
        backend.encode_special_tokens = self._vocabulary["split_special_tokens"]
        return backend

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
        for given, encoding in zip(inputs, self._whole.encode_batch_fast(inputs), strict=True):
            num_tokens = len(encoding.ids)
            if strategy is not None and num_tokens > max_length:
                encoding = self._cut(given, max_length, strategy)
            results.append(Encoded(self._tokens(encoding), num_tokens))
        return results

    def _cut(self, given: Input, max_length: int, strategy: str) -> tokenizers.Encoding:
        with self._lock:
            if self._cutting is None:
                self._cutting = self._build()
            self._cutting.enable_truncation(
                max_length, strategy=strategy, direction=self._vocabulary["truncation_side"]
            )
            try:
                pair = (given,) if isinstance(given, str) else given
                return self._cutting.encode(*pair)
            except Exception as error:  # the Rust side raises nothing more precise
                raise ValueError(f"cannot be cut to {max_length} tokens: {error}") from None

    def _tokens(self, encoding: tokenizers.Encoding) -> Tokens:
        type_ids = encoding.type_ids if self._vocabulary["type_ids"] else ()
        return Tokens(encoding.ids, list(type_ids) if any(type_ids) else None)
