"""Which queued rows go through the next forward. Plain Python: lengths in, indices out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Planner:
    """Picks the oldest row, then those nearest to it in length, under a padded-token budget.

    Attributes:
        max_rows: Most rows in a batch.
        max_tokens: Most tokens in a batch once padded: rows x the longest of them. A single row
            may exceed it, since it could never run otherwise.
        max_stretch: A row joins only if padding at most so many times lengthens it (short rows
            count as `short_tokens`): beyond that the padding costs more than another forward.
        short_tokens: Length under which a forward costs about the same.
    """

    max_rows: int
    max_tokens: int
    max_stretch: float = 2.0
    short_tokens: int = 16

    def pick(self, lengths: Sequence[int]) -> list[int]:
        """Choose the next batch from the whole queue.

        Args:
            lengths: Tokens of every waiting row, oldest first; not empty.

        Returns:
            Indices into `lengths`, ascending; 0 is always among them, so no row waits for ever.
        """
        oldest = lengths[0]
        joining = {n for n in set(lengths) if self._may_share(max(n, oldest), min(n, oldest))}
        nearest = [index for index, length in enumerate(lengths) if index and length in joining]
        # A longer row pads all others, a shorter one only itself: its distance counts twice.
        # Stable: of equal distances the older row goes first.
        nearest.sort(key=[max(oldest - n, 2 * (n - oldest)) for n in lengths].__getitem__)
        picked, longest, shortest = [0], oldest, oldest
        for index in nearest:
            if len(picked) == self.max_rows or (len(picked) + 1) * longest > self.max_tokens:
                break
            high = max(longest, lengths[index])
            low = min(shortest, lengths[index])
            if (len(picked) + 1) * high <= self.max_tokens and self._may_share(high, low):
                picked.append(index)
                longest, shortest = high, low
        return sorted(picked)

    def _may_share(self, longest: int, shortest: int) -> bool:
        """Whether the shortest row may be padded to the longest."""
        return longest <= self.max_stretch * max(shortest, self.short_tokens)
