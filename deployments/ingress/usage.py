"""What this ingress counted of each version since it last told the catalog."""

from __future__ import annotations

import time
from collections.abc import Iterable

from deployments.snapshot import Usage


class Tally:
    """Counts rows by version; a row is an input of a request, whatever windows it has."""

    def __init__(self) -> None:
        """Begin at nothing."""
        self._counts: dict[tuple[str, str], Usage] = {}

    def answered(self, task: str, version: str, num_rows: int, num_errors: int = 0) -> None:
        """Count rows that a version was asked for, those among them that failed in the model too.

        What fails by its caller's fault is no row here: it never reaches the model. Nor is what no
        replica had room for, which is no version's fault either.
        """
        self._add(
            Usage(
                task=task,
                version=version,
                num_rows=num_rows,
                num_errors=num_errors,
                last_used_s=time.time(),
            )
        )

    def shadowed(
        self, task: str, version: str, num_rows: int, num_agreed: int, score_shift: float
    ) -> None:
        """Count rows that a version ran as a shadow; those that failed there agree with nothing."""
        self._add(
            Usage(
                task=task,
                version=version,
                num_shadowed=num_rows,
                num_agreed=num_agreed,
                score_shift=score_shift,
            )
        )

    def take(self) -> list[Usage]:
        """Return what was counted since the last take."""
        taken, self._counts = list(self._counts.values()), {}
        return taken

    def put_back(self, taken: Iterable[Usage]) -> None:
        """Count again what could not be told, so that the next take has it."""
        for usage in taken:
            self._add(usage)

    def _add(self, more: Usage) -> None:
        name = (more.task, more.version)
        known = self._counts.get(name)
        self._counts[name] = more if known is None else _sum(known, more)


def _sum(one: Usage, other: Usage) -> Usage:
    return Usage(
        task=one.task,
        version=one.version,
        num_rows=one.num_rows + other.num_rows,
        num_errors=one.num_errors + other.num_errors,
        last_used_s=max(one.last_used_s, other.last_used_s),
        num_shadowed=one.num_shadowed + other.num_shadowed,
        num_agreed=one.num_agreed + other.num_agreed,
        score_shift=one.score_shift + other.score_shift,
    )
