"""How often versions answered and failed, summed over the ingresses. No ray."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from deployments.snapshot import Snapshot
from deployments.usage import Usage

# Fewer say nothing of a rate: one unlucky row would end a canary.
_LEAST_ROWS = 20
# What ingresses tell so long after a changed share, they may have counted before it.
_LATE_S = 2.0
# Of a version that has a share long since, so many of its last rows say how it does, or up to twice
# as many. Rows, and not a time: a task that is seldom asked is judged as well.
_WINDOW_ROWS = 1000


@dataclass(slots=True)
class _Sum(Usage):
    # Rows and errors since the version got its share, or lost it: when there are many, those before
    # the newest thousand are let go.
    newer: tuple[int, int] = (0, 0)
    older: tuple[int, int] = (0, 0)
    trial_from_s: float = 0.0

    def try_from(self, begin_s: float) -> None:
        """Forget what was tried, and begin anew at a time."""
        self.newer = self.older = (0, 0)
        self.trial_from_s = begin_s

    def try_more(self, num_rows: int, num_errors: int) -> None:
        """Count rows that were tried."""
        rows, errors = self.newer
        self.newer = (rows + num_rows, errors + num_errors)
        if self.newer[0] >= _WINDOW_ROWS:
            self.newer, self.older = (0, 0), self.newer

    @property
    def tried(self) -> tuple[int, int]:
        """The rows that count, and the errors among them."""
        return self.newer[0] + self.older[0], self.newer[1] + self.older[1]


class UsageSums:
    """What was counted of each version since this process started. Owned by one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing; the clock tells seconds."""
        self._clock = clock
        self._sums: defaultdict[str, dict[str, _Sum]] = defaultdict(dict)

    def add(self, counted: Iterable[Usage], snapshot: Snapshot) -> None:
        """Add what an ingress counted since it last told, of what is not deleted meanwhile."""
        for usage in counted:
            record = snapshot.tasks.get(usage.task)  # None of a plain folder
            if record is not None and (record.deleted or usage.version not in record.versions):
                continue
            total = self._of(usage.task, usage.version)
            total.add(usage)
            if self._clock() >= total.trial_from_s:
                total.try_more(usage.num_rows, usage.num_errors)

    def changed(self, old: Snapshot, new: Snapshot) -> None:
        """Begin new trials where shares or the rate changed; forget versions that are gone."""
        for task in old.tasks.keys() | new.tasks.keys():
            before, now = old.tasks.get(task), new.tasks.get(task)
            if before is now:
                continue
            if now is None or now.deleted:
                self._sums.pop(task, None)
                continue
            sums = self._sums[task]
            for version in sums.keys() - now.versions.keys():
                del sums[version]
            rated_anew = before is None or before.max_error_rate != now.max_error_rate
            for version, share in now.traffic.items():
                if rated_anew or before is None or before.traffic.get(version) != share:
                    self._of(task, version).try_from(self._clock() + _LATE_S)

    def failing(self, snapshot: Snapshot) -> Iterator[tuple[str, str, str]]:
        """Yield (task, version, reason) of every version whose share has to go back."""
        for task, record in snapshot.tasks.items():
            if record.max_error_rate is None or record.deleted:
                continue
            for version in record.traffic:
                num_rows, num_errors = self._of(task, version).tried
                if num_rows >= _LEAST_ROWS and num_errors / num_rows > record.max_error_rate:
                    yield (
                        task,
                        version,
                        f"{num_errors} of {num_rows} rows failed, over "
                        f"max_error_rate {record.max_error_rate:g}",
                    )

    def of(self, task: str) -> dict[str, dict[str, Any]]:
        """Return what was counted of each version of a task, plain data."""
        return {version: _told(total) for version, total in self._sums.get(task, {}).items()}

    def _of(self, task: str, version: str) -> _Sum:
        return self._sums[task].setdefault(version, _Sum(task, version))


def _told(total: Usage) -> dict[str, Any]:
    told: dict[str, Any] = {
        "num_rows": total.num_rows,
        "num_errors": total.num_errors,
        "last_used_s": total.last_used_s,
    }
    if total.num_shadowed:
        told["shadow"] = {
            "num_rows": total.num_shadowed,
            "agreement": total.num_agreed / total.num_shadowed,
            "mean_score_shift": total.score_shift / total.num_shadowed,
        }
    return told
