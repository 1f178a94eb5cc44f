"""What this ingress counted of each version since it last told the catalog."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from deployments.snapshot import Usage


@dataclass(slots=True)
class _Counts:
    """As `Usage` has them."""

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
        self._counts: defaultdict[tuple[str, str], _Counts] = defaultdict(_Counts)

    def answered(self, task: str, version: str, num_rows: int, num_errors: int = 0) -> None:
        """Count rows that a version was asked for, those among them that failed in the model too.

        What fails by its caller's fault is no row here: it never reaches the model. Nor is what no
        replica had room for, which is no version's fault either.
        """
        counts = self._counts[task, version]
        counts.num_rows += num_rows
        counts.num_errors += num_errors
        counts.last_used_s = time.time()

    def shadowed(
        self, task: str, version: str, num_rows: int, num_agreed: int, score_shift: float
    ) -> None:
        """Count rows that a version ran as a shadow; those that failed there agree with nothing."""
        counts = self._counts[task, version]
        counts.num_shadowed += num_rows
        counts.num_agreed += num_agreed
        counts.score_shift += score_shift

    def take(self) -> list[Usage]:
        """Return what was counted since the last take."""
        taken = [
            Usage.model_validate({"task": task, "version": version, **asdict(counts)})
            for (task, version), counts in self._counts.items()
        ]
        self._counts.clear()
        return taken

    def put_back(self, taken: Iterable[Usage]) -> None:
        """Count again what could not be told, so that the next take has it."""
        for usage in taken:
            counts = self._counts[usage.task, usage.version]
            counts.num_rows += usage.num_rows
            counts.num_errors += usage.num_errors
            counts.last_used_s = max(counts.last_used_s, usage.last_used_s)
            counts.num_shadowed += usage.num_shadowed
            counts.num_agreed += usage.num_agreed
            counts.score_shift += usage.score_shift
