"""How many rows may be on their way, and how many of them of one task."""

from __future__ import annotations

from deployments.errors import Overloaded
from deployments.retry import Line

# A request takes as much room as so many rows, even if it has fewer: what is held for it is more.
LEAST_ROWS = 4
# So many tasks at most are known to be refused.
_MOST_LINES = 1024


class Room:
    """Rows on their way, counted by task; owned by one event loop.

    A task may have as many as it leaves free (dynamic thresholds: Choudhury and Hahne, 1998): one
    that is alone half of the room, two a third each. So there is always some for another task,
    however many rows the others would send.
    """

    def __init__(self, max_rows: int) -> None:
        """Take the most rows of all tasks together."""
        self._free = max_rows
        self._taken: dict[str, int] = {}
        self._lines: dict[str, Line] = {}  # from a refusal until none of the task is on its way

    @property
    def num_taken(self) -> int:
        """Rows that are on their way."""
        return sum(self._taken.values())

    def take(self, task: str, num_rows: int) -> None:
        """Let rows in.

        Raises:
            Overloaded: There is no room for them now; none is let in.
        """
        self.check(task, num_rows)
        self._free -= num_rows
        self._taken[task] = self._taken.get(task, 0) + num_rows

    def check(self, task: str, num_rows: int) -> None:
        """Raise what `take` would, and let nothing in."""
        if self._taken.get(task, 0) + num_rows <= self._free - num_rows:
            return
        line = self._lines.get(task)
        if line is None:
            if len(self._lines) >= _MOST_LINES:
                self._lines.clear()
            line = self._lines[task] = Line()
        wait_s = line.turn(num_rows)
        raise Overloaded(
            f"there are too many texts for {task!r} on their way; try again in {wait_s} s", wait_s
        )

    def give_back(self, task: str, num_rows: int) -> None:
        """Let rows out."""
        self._free += num_rows
        self._taken[task] -= num_rows
        if not self._taken[task]:
            del self._taken[task]
            self._lines.pop(task, None)
        elif task in self._lines:
            self._lines[task].left(num_rows)
