"""A row that waits for its forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from adapters.rules import Priority


class Waits(Protocol):
    """A row in the queue; see `deployments.rows.Row`."""

    @property
    def num_tokens(self) -> int:
        """Length in tokens, before padding."""

    @property
    def share(self) -> str:
        """Whose service it is: the task."""

    @property
    def request(self) -> int:
        """Rows of one request have the same number."""

    @property
    def priority(self) -> Priority:
        """Its task's."""

    @property
    def deadline_s(self) -> float | None:
        """By this process's monotonic clock, when it need not be answered any more."""


@dataclass(slots=True, eq=False)
class Waiter:
    """A row that waits.

    Attributes:
        row: The row, a `Waits`.
        answer: What is told to whoever waits for it.
        gone: Whether it waits no more, being taken or given up.
    """

    row: Any
    answer: Any = None
    gone: bool = True
