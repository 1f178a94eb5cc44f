"""What tasks and requests have had, whose rows wait. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass, field

from deployments.model.waiter import Waiter, Waits


@dataclass(slots=True, eq=False)
class Request:
    """A request of which rows wait; `start` is its task's clock when it came."""

    start: float
    num_tokens: int = 0  # of all its rows so far
    num_rows: int = 0  # that wait


@dataclass(slots=True, eq=False)
class Task:
    """A task of which rows wait.

    Attributes:
        served: Tokens that went, on the level's clock.
        clock: What each of its requests has had, if each had the same and they are not many.
        num_rows: That wait.
        num_tokens: Of these.
        heaps: Rows by kind, see `deployments.model.shares.Shares`; of each (when it is due on the
            clock, number, row).
    """

    name: str
    level: Level
    served: float
    clock: float = 0.0
    num_rows: int = 0
    num_tokens: int = 0
    requests: dict[int, Request] = field(default_factory=dict)
    heaps: dict[int, list[tuple[float, int, Waiter]]] = field(default_factory=dict)

    def first(self) -> int:
        """Return the kind of the row that is due first."""
        return min(self.heaps, key=lambda kind: self.heaps[kind][0][:2])

    def next_length(self, kind: int) -> int:
        """Return the tokens of the next row of a kind."""
        row: Waits = self.heaps[kind][0][2].row
        return row.num_tokens


@dataclass(slots=True, eq=False)
class Level:
    """A priority: its tasks of which rows wait, and what others had that may come again."""

    weight: int
    served: float = 0.0
    clock: float = 0.0
    tasks: dict[str, Task] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)
