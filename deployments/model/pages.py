"""How large the pages of the bank are, and which are free. Plain Python: counts in, ranges out."""

from __future__ import annotations

import math
from collections.abc import Sequence


def page_bytes(width: int, itemsize: int) -> int:
    """Return the size of a page: about half of a vector, so that a tensor's end loses little.

    Args:
        width: Elements of a typical vector (the hidden size).
        itemsize: Bytes of an element.
    """
    return int(2 ** max(6, int(math.log2(width * itemsize / 2))))


def pages_of(num_bytes: int, page: int) -> int:
    """Return how many pages of `page` bytes a tensor takes."""
    return -(-num_bytes // page)


class Pages:
    """A free list of page numbers, kept as ranges: whatever is free can be had, in pieces.

    An adapter need not lie in one piece, so nothing is ever moved to make room for another.
    """

    def __init__(self, first: int, stop: int) -> None:
        """Begin with the pages first … stop - 1, all of them free."""
        self._free = [range(first, stop)] if first < stop else []  # ascending, never adjacent
        self.num_free = stop - first

    def take(self, count: int) -> list[range]:
        """Return `count` pages, in one piece where there is one.

        Raises:
            MemoryError: Fewer are free.
        """
        if count > self.num_free:
            raise MemoryError(f"{count} pages are asked for, and {self.num_free} are free")
        fitting = [piece for piece in self._free if len(piece) >= count]
        taken: list[range] = []
        while count:
            # The tightest fit; where nothing fits, the largest, so that the pieces are few.
            piece = min(fitting, key=len) if fitting else max(self._free, key=len)
            part, rest = piece[:count], piece[count:]
            index = self._free.index(piece)
            self._free[index : index + 1] = [rest] if rest else []
            taken.append(part)
            count -= len(part)
            self.num_free -= len(part)
        return taken

    def give(self, pieces: Sequence[range]) -> None:
        """Take pages back."""
        self.num_free += sum(map(len, pieces))
        joined: list[range] = []
        for piece in sorted([*self._free, *pieces], key=lambda piece: piece.start):
            if joined and joined[-1].stop == piece.start:
                joined[-1] = range(joined[-1].start, piece.stop)
            else:
                joined.append(piece)
        self._free = joined
