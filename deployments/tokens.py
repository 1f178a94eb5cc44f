"""Text to ids by the Rust tokenizers, exactly as AutoTokenizer makes them. No torch.

The model side exports AutoTokenizer's backend once (`deployments.model.vocabulary`): importing
AutoTokenizer would bring torch into the ingress.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypedDict

import tokenizers

from deployments.rows import Tokens
from deployments.spans import Span, Spans

Input = str | tuple[str, str]


class Vocabulary(TypedDict):
    """A tokenizer as it travels from the model to the ingress.

    Attributes:
        backend: The Rust tokenizer as JSON, truncation and padding cleared.
        max_length: Most tokens that the base can take.
        truncation_side: Which end of a long text goes, `left` or `right`.
        split_special_tokens: Whether `[SEP]` in a text is text.
        type_ids: Whether the base reads segment ids.
        unk_id: The id of what the vocabulary lacks, None where it lacks nothing.
    """

    backend: str
    max_length: int
    truncation_side: str
    split_special_tokens: bool
    type_ids: bool
    unk_id: int | None


class Encoded(NamedTuple):
    """One input's tokens, or those of a window of it.

    Attributes:
        tokens: What the base reads.
        num_tokens: Tokens of the whole input, before anything was cut.
        spans: Where each token stands in the text, None for a special token; None altogether
            where nobody asked, or where the input was left longer than it may be.
        first: Place, among the text's tokens, of the first that this window has.
    """

    tokens: Tokens
    num_tokens: int
    spans: list[Span | None] | None = None
    first: int = 0

    @property
    def truncated(self) -> bool:
        """Whether the end, or the start, of the input was cut."""
        return self.num_tokens > len(self.tokens.ids)


class _Whole(NamedTuple):
    """An input before anything is cut; its lists are made once, since Rust copies them."""

    encoding: tokenizers.Encoding
    ids: list[int]
    type_ids: list[int] | None
    locate: Callable[[Sequence[int]], list[Span | None]] | None

    def sequences(self) -> list[int | None]:
        """Return for each token its text, 0 or 1, or None for a special token."""
        sequences: list[int | None] = self.encoding.sequence_ids
        return sequences

    def part(self, kept: Iterable[int], first: int = 0) -> Encoded:
        """Return the tokens at some indices, `first` being the place of the first in its text."""
        kept = list(kept)
        segments = None if self.type_ids is None else [self.type_ids[index] for index in kept]
        return Encoded(
            Tokens(
                [self.ids[index] for index in kept],
                segments if segments and any(segments) else None,
            ),
            len(self.ids),
            None if self.locate is None else self.locate(kept),
            first,
        )


class Tokenizer:
    """Encodes texts and pairs; safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Build the Rust tokenizer from its JSON."""
        self._cut_left = vocabulary["truncation_side"] == "left"
        self._type_ids = vocabulary["type_ids"]
        self._backend = tokenizers.Tokenizer.from_str(vocabulary["backend"])
        self._backend.encode_special_tokens = vocabulary["split_special_tokens"]
        self._spans = Spans(self._backend, vocabulary["unk_id"])

    def encode(
        self,
        inputs: Sequence[Input],
        max_length: int,
        strategy: str | None = "longest_first",
        *,
        spans: bool = False,
    ) -> list[Encoded]:
        """Encode a batch.

        Args:
            inputs: Texts, or pairs of texts.
            max_length: Longest result in tokens, special tokens included.
            strategy: `longest_first`, `only_first` or `only_second` cut what is longer; None
                leaves it whole.
            spans: Whether to say where each token stands; of texts, not of pairs.

        Raises:
            ValueError: An input cannot be cut to `max_length` in this way.
        """
        results = []
        for whole in self._read(inputs, spans):
            kept: Iterable[int] = range(len(whole.ids))
            if strategy is not None and len(whole.ids) > max_length:
                kept = self._kept(whole.sequences(), max_length, strategy)
            elif len(whole.ids) > max_length:
                whole = whole._replace(locate=None)  # to be refused, however many they are
            results.append(whole.part(kept))
        return results

    def windows(
        self,
        inputs: Sequence[Input],
        max_length: int,
        stride: int,
        strategy: str,
        *,
        max_windows: int,
        spans: bool = False,
    ) -> list[list[Encoded]] | None:
        """Encode a batch, what is longer than `max_length` in several windows.

        They are those of `tokenizer(…, return_overflowing_tokens=True, stride=…)`: of equal length
        but for the last, each with the special tokens, and of a pair with the whole other text.

        Args:
            inputs: Texts, or pairs of texts.
            max_length: Longest window in tokens, special tokens included.
            stride: Tokens that a window shares with the one before it.
            strategy: `only_second` cuts the second text of a pair, all others the first.
            max_windows: Most windows of all inputs together.
            spans: As `encode`.

        Returns:
            One or more windows of each input; None if they would be more than `max_windows`.

        Raises:
            ValueError: An input cannot be cut in this way.
        """
        results: list[list[Encoded]] = []
        for whole in self._read(inputs, spans):
            if len(whole.ids) <= max_length:
                windows = [whole.part(range(len(whole.ids)))]
            else:
                text, room = _window(whole.sequences(), max_length, stride, strategy)
                # Counted before they are made: a stride near the room would make many of few.
                if 1 - (room - len(text)) // (room - stride) > max_windows:
                    return None
                windows = list(self._windows(whole, text, room, stride))
            max_windows -= len(windows)
            if max_windows < 0:
                return None
            results.append(windows)
        return results

    def _read(self, inputs: Sequence[Input], spans: bool) -> Iterator[_Whole]:
        # The fast way leaves out the offsets.
        encode = self._backend.encode_batch if spans else self._backend.encode_batch_fast
        for given, encoding in zip(inputs, encode(inputs), strict=True):
            ids, type_ids = encoding.ids, encoding.type_ids if self._type_ids else None
            locate = None
            if spans and isinstance(given, str):
                locate = partial(self._spans.of, given, encoding, ids)
            yield _Whole(encoding, ids, type_ids, locate)

    def _windows(self, whole: _Whole, text: range, room: int, stride: int) -> Iterator[Encoded]:
        """Yield windows of `room` tokens of `text`, from the end that a cut would keep."""
        before, after = range(text.start), range(text.stop, len(whole.ids))
        for passed in range(0, len(text), room - stride):
            if self._cut_left:
                stop = len(text) - passed
                start = max(0, stop - room)
            else:
                start, stop = passed, min(passed + room, len(text))
            yield whole.part([*before, *text[start:stop], *after], start)
            if passed + room >= len(text):
                return

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


def _window(
    sequences: Sequence[int | None], max_length: int, stride: int, strategy: str
) -> tuple[range, int]:
    """Return the indices of the text that windows go over, and how many of them fit in one.

    Raises:
        ValueError: A window has no room for more than the stride.
    """
    cut = int(strategy == "only_second")
    text = [index for index, sequence in enumerate(sequences) if sequence == cut]
    room = max_length - (len(sequences) - len(text))
    if room <= stride or not text:
        raise ValueError(
            f"cannot be read in windows of {max_length} tokens: beside what is in all of them "
            f"there is room for {max(room, 0)}, which must be over the stride of {stride}"
        )
    return range(text[0], text[-1] + 1), room


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
