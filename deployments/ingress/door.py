"""Admission: a request comes in if there is room for its rows, and has until its deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType

from deployments.errors import BadInput, TooLate
from deployments.room import LEAST_ROWS, Room

TIMEOUT = "X-Request-Timeout-Seconds"
# What Ray Serve answers by itself when the header's time is over is no problem+json: so much
# earlier, as a share of that time and in seconds at most, the deadline is here.
_EARLIER, _MOST_EARLIER_S = 0.1, 0.25


class Visit:
    """A request that is in, until the block ends.

    Attributes:
        deadline_s: By the event loop's clock, when nobody waits for its answer any more; None if
            there is no such time.
    """

    def __init__(self, room: Room, task: str, num_rows: int, deadline_s: float | None) -> None:
        """Take its rows in.

        Raises:
            Overloaded: There is no room for them.
        """
        self._room = room
        self._task = task
        self._num_rows = max(num_rows, LEAST_ROWS)
        room.take(task, self._num_rows)
        self.deadline_s = deadline_s

    def grow(self, num_rows: int) -> None:
        """Count all the rows that its inputs have become.

        Raises:
            Overloaded: There is no room for so many.
        """
        more = num_rows - self._num_rows
        if more > 0:
            self._room.take(self._task, more)
            self._num_rows = num_rows

    def __enter__(self) -> Visit:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let its rows out."""
        self._room.give_back(self._task, self._num_rows)


@asynccontextmanager
async def until(deadline_s: float | None) -> AsyncIterator[None]:
    """Run the block until a time by the event loop's clock, without end if it is None.

    Raises:
        TooLate: It has not ended by then, and was cancelled.
    """
    try:
        async with asyncio.timeout_at(deadline_s) as ends:
            yield
    except TimeoutError:
        if not ends.expired():
            raise
        raise TooLate("the deadline passed before there was an answer") from None


def to_deadline(timeout_s: float | None) -> float | None:
    """Return by when a request has to be answered, by the event loop's clock, which must run.

    Args:
        timeout_s: In how many seconds its caller goes, over 0; None if never.
    """
    if timeout_s is None:
        return None
    early_s = min(_EARLIER * timeout_s, _MOST_EARLIER_S)
    return asyncio.get_running_loop().time() + timeout_s - early_s


def check_timeout(timeout_s: object) -> float | None:
    """Validate a timeout that a handle call was given.

    Raises:
        BadInput: It is no number of seconds.
    """
    if timeout_s is None:
        return None
    number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
    if not number or not 0 < timeout_s < float("inf"):  # type: ignore[operator]
        raise BadInput(f"timeout_s={timeout_s!r} is no number of seconds over 0")
    return float(timeout_s)  # type: ignore[arg-type]
