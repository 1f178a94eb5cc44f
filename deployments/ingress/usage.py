"""What this ingress counted of each version since it last told the catalog."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from deployments.errors import NotReady

logger = logging.getLogger("ray.serve")

Tell = Callable[[list[dict[str, Any]]], Awaitable[None]]
"""Tells the catalog what was counted; each entry is a `deployments.snapshot.Usage`, plain."""


@dataclass(slots=True)
class Counts:
    """As `deployments.snapshot.Usage` has them; the catalog is who validates them."""

    task: str
    version: str
    num_rows: int = 0
    num_errors: int = 0
    last_used_s: float = 0.0
    num_shadowed: int = 0
    num_agreed: int = 0
    score_shift: float = 0.0


class Tally:
    """Counts rows by version; a row is an input of a request, whatever windows it has."""

    def __init__(self) -> None:
        """Begin at nothing."""
        self._counts: dict[tuple[str, str], Counts] = {}

    def answered(self, task: str, version: str, num_rows: int, num_errors: int = 0) -> None:
        """Count rows that a version was asked for, those among them that failed in the model too.

        What fails by its caller's fault is no row here: it never reaches the model. Nor is what no
        replica had room for, which is no version's fault either.
        """
        counts = self._of(task, version)
        counts.num_rows += num_rows
        counts.num_errors += num_errors
        counts.last_used_s = time.time()

    def shadowed(
        self, task: str, version: str, num_rows: int, num_agreed: int, score_shift: float
    ) -> None:
        """Count rows that a version ran as a shadow; those that failed there agree with nothing."""
        counts = self._of(task, version)
        counts.num_shadowed += num_rows
        counts.num_agreed += num_agreed
        counts.score_shift += score_shift

    def take(self) -> list[Counts]:
        """Return what was counted since the last take."""
        taken = list(self._counts.values())
        self._counts = {}
        return taken

    def put_back(self, taken: Iterable[Counts]) -> None:
        """Count again what could not be told, so that the next take has it."""
        for one in taken:
            counts = self._of(one.task, one.version)
            counts.num_rows += one.num_rows
            counts.num_errors += one.num_errors
            counts.last_used_s = max(counts.last_used_s, one.last_used_s)
            counts.num_shadowed += one.num_shadowed
            counts.num_agreed += one.num_agreed
            counts.score_shift += one.score_shift

    def _of(self, task: str, version: str) -> Counts:
        counts = self._counts.get((task, version))
        if counts is None:
            counts = self._counts[task, version] = Counts(task, version)
        return counts


async def report(tally: Tally, tell: Tell, every_s: float) -> None:
    """Tell what was counted every so many seconds, until cancelled.

    What could not be told is counted again, whatever the reason; the log has it once, until it
    goes well or another one comes. That the catalog is away is none of that.
    """
    said: str | None = None
    while True:
        await asyncio.sleep(every_s)
        counted = tally.take()
        if not counted:
            continue
        try:
            await tell([asdict(one) for one in counted])
            said = None
        except NotReady:
            tally.put_back(counted)
        except Exception as error:
            tally.put_back(counted)
            if said != type(error).__name__:
                said = type(error).__name__
                logger.warning("what was counted could not be told", exc_info=error)
