"""Which queued rows go through the next forward. Plain Python: lengths in, indices out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Where layers see no padding, embeddings and heads do: so many times the tokens cost little there.
_MOST_PADDED = 4


@dataclass(frozen=True, slots=True)
class Planner:
    """Picks the oldest row, then those nearest to it in length, under a budget of tokens.

    Attributes:
        max_rows: Most rows in a batch.
        max_tokens: Most tokens in a batch, see `tokens`. A single row may exceed it, since it
            could never run otherwise.
        max_stretch: A row joins only if padding at most so many times lengthens it (short rows
            count as `short_tokens`): beyond that the padding costs more than another forward.
        short_tokens: Length under which a forward costs about the same.
        padded: Whether layers work on padding. If not, rows of any lengths go together.
    """

    max_rows: int
    max_tokens: int
    max_stretch: float = 2.0
    short_tokens: int = 16
    padded: bool = True

    def tokens(self, lengths: Sequence[int]) -> int:
        """Return the tokens that a batch has: rows x the longest of them if it is padded."""
        return len(lengths) * max(lengths) if self.padded else sum(lengths)

    def pick(self, lengths: Sequence[int]) -> list[int]:
        """Choose the next batch from the whole queue.

        Args:
            lengths: Tokens of every waiting row, oldest first; not empty.

        Returns:
            Indices into `lengths`, ascending; 0 is always among them, so no row waits for ever.
        """
        oldest, filling = lengths[0], self.start(lengths[0])
        nearest = [i for i, n in enumerate(lengths) if i and filling.fits(n)]
        # Stable: of equal distances the older row goes first.
        nearest.sort(key=[_distance(n, oldest) for n in lengths].__getitem__)
        picked = [0]
        for index in nearest:
            if filling.full:
                break
            if filling.offer(lengths[index]):
                picked.append(index)
        return sorted(picked)

    def start(self, length: int) -> Filling:
        """Begin a batch with the row that goes whatever else does, of so many tokens."""
        return Filling(self, length)

    def holds(self, num_rows: int, longest: int, shortest: int, total: int) -> bool:
        """Whether so many rows may go together, of so many tokens at most, at least and in all."""
        if num_rows > self.max_rows:
            return False
        if not self.padded:
            return total <= self.max_tokens and num_rows * longest <= _MOST_PADDED * self.max_tokens
        may_share = longest <= self.max_stretch * max(shortest, self.short_tokens)
        return may_share and num_rows * longest <= self.max_tokens


class Filling:
    """A batch that rows are offered to."""

    def __init__(self, planner: Planner, length: int) -> None:
        """Begin with a row of so many tokens, under a planner's limits."""
        self._planner = planner
        self._lead = self._longest = self._shortest = self._total = length
        self._num_rows = 1

    @property
    def max_tokens(self) -> int:
        """Most tokens that it may have."""
        return self._planner.max_tokens

    @property
    def full(self) -> bool:
        """Whether no row at all has room in it."""
        # The least that another could be: it must not stretch, and has a token.
        more, total = self._num_rows + 1, self._total + 1
        return not self._planner.holds(more, self._longest, self._longest, total)

    def near(self, lengths: Iterable[int]) -> list[int]:
        """Return those of some lengths that may go with the first row, the best ones first.

        A longer row pads all others, a shorter one only itself: its distance counts twice.
        """
        return sorted(filter(self.fits, lengths), key=lambda n: _distance(n, self._lead))

    def fits(self, length: int) -> bool:
        """Whether a row of so many tokens has room now; if not, it will not later either."""
        longest, shortest = max(self._longest, length), min(self._shortest, length)
        return self._planner.holds(self._num_rows + 1, longest, shortest, self._total + length)

    def offer(self, length: int) -> bool:
        """Take a row of so many tokens if it has room; tell whether it was taken."""
        if not self.fits(length):
            return False
        self._num_rows += 1
        self._total += length
        self._longest, self._shortest = max(self._longest, length), min(self._shortest, length)
        return True


def _distance(length: int, lead: int) -> int:
    return 2 * (length - lead) if length > lead else lead - length
