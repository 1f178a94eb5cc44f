"""How often versions answered and failed, summed over the ingresses. No ray."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from deployments.snapshot import Snapshot, Usage

# Fewer say nothing of a rate: one unlucky row would end a canary.
_LEAST_ROWS = 20
# What ingresses tell so long after a changed share, they may have counted before it.
_LATE_S = 2.0


@dataclass(slots=True)
class _Sum:
    num_rows: int = 0
    num_errors: int = 0
    last_used_s: float = 0.0
    num_shadowed: int = 0
    num_agreed: int = 0
    score_shift: float = 0.0
    # Since the version got its share, or lost it.
    trial_rows: int = 0
    trial_errors: int = 0
    trial_from_s: float = 0.0


class UsageSums:
    """What was counted of each version since this process started. Owned by one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing; the clock tells seconds."""
        self._clock = clock
        self._sums: defaultdict[str, defaultdict[str, _Sum]] = defaultdict(
            lambda: defaultdict(_Sum)
        )

    def add(self, counted: Iterable[Usage]) -> None:
        """Add what an ingress counted since it last told."""
        for usage in counted:
            total = self._sums[usage.task][usage.version]
            total.num_rows += usage.num_rows
            total.num_errors += usage.num_errors
            if self._clock() >= total.trial_from_s:
                total.trial_rows += usage.num_rows
                total.trial_errors += usage.num_errors
            total.last_used_s = max(total.last_used_s, usage.last_used_s)
            total.num_shadowed += usage.num_shadowed
            total.num_agreed += usage.num_agreed
            total.score_shift += usage.score_shift

    def changed(self, old: Snapshot, new: Snapshot) -> None:
        """Begin new trials where shares changed, and forget versions that are gone."""
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
            for version, share in now.traffic.items():
                if before is None or before.traffic.get(version) != share:
                    total = sums[version]
                    total.trial_rows = total.trial_errors = 0
                    total.trial_from_s = self._clock() + _LATE_S

    def failing(self, snapshot: Snapshot) -> Iterator[tuple[str, str, str]]:
        """Yield (task, version, reason) of every version whose share has to go back."""
        for task, record in snapshot.tasks.items():
            if record.max_error_rate is None or record.deleted:
                continue
            for version in record.traffic:
                total = self._sums[task][version]
                if total.trial_rows < _LEAST_ROWS:
                    continue
                rate = total.trial_errors / total.trial_rows
                if rate > record.max_error_rate:
                    yield (
                        task,
                        version,
                        f"{total.trial_errors} of {total.trial_rows} rows failed, over "
                        f"max_error_rate {record.max_error_rate:g}",
                    )

    def of(self, task: str) -> dict[str, dict[str, Any]]:
        """Return what was counted of each version of a task, plain data."""
        return {version: _told(total) for version, total in self._sums.get(task, {}).items()}


def _told(total: _Sum) -> dict[str, Any]:
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
