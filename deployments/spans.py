"""Where tokens stand in their text, and which of them go on with a word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import tokenizers


class Span(NamedTuple):
    """A token's place in its text.

    Attributes:
        start: Of its first character: a code point, as Python counts them.
        end: After its last one.
        subword: Whether it goes on with the word of the token before it.
    """

    start: int
    end: int
    subword: bool


class Spans:
    """Finds the spans of a tokenizer's tokens, by the rules of transformers' pipeline.

    The rule for `subword` is `TokenClassificationPipeline.gather_pre_entities`: it decides what a
    word is, so an answer depends on it even where it is odd (in BERT's lower case "e" with a
    combining accent is two characters for one, hence a subword).
    """

    def __init__(self, backend: tokenizers.Tokenizer, unk_id: int | None) -> None:
        """Take the Rust tokenizer, and the id of what its vocabulary lacks."""
        self._backend = backend
        self._marks_subwords = bool(getattr(backend.model, "continuing_subword_prefix", None))
        self._unk_id = unk_id

    def of(
        self, text: str, encoding: tokenizers.Encoding, ids: Sequence[int], kept: Iterable[int]
    ) -> list[Span | None]:
        """Return the spans of the tokens at some indices, None for the template's special tokens.

        One by one: `encoding.offsets` would make a tuple for each of a million tokens to be cut.

        Args:
            text: What was encoded.
            encoding: Its tokens.
            ids: Their ids.
            kept: Indices of the tokens that are asked for.
        """
        spans: list[Span | None] = []
        for index in kept:
            place = encoding.token_to_chars(index)
            spans.append(place and Span(*place, self._subword(text, *place, ids[index])))
        return spans

    def _subword(self, text: str, start: int, end: int, id_: int) -> bool:
        if id_ == self._unk_id:
            return False
        if self._marks_subwords:
            token = self._backend.id_to_token(id_) or ""
            return len(token) != len(text[start:end])
        # Such a tokenizer says nothing of words: what stands behind no blank goes on with one.
        return start > 0 and " " not in text[start - 1 : start + 1]
