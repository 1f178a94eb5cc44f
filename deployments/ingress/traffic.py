"""Which of a task's versions answers a request."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

from deployments.snapshot import TaskRecord

_NOTHING = 1e-9  # a share that is only what rounding left


class Splitter:
    """Takes a share of the turns, in an order that nobody can foresee.

    Of n turns it takes either of the two whole numbers next to share·n, so it is never a whole turn
    off, and each turn is taken with the probability `share`: a caller whose texts come in a pattern
    meets no pattern here.
    """

    def __init__(self, share: float, chance: Callable[[], float] = random.random) -> None:
        """Take a share from 0 to 1, and numbers from 0 to under 1."""
        self._share = share
        self._chance = chance
        self._part = 0.0  # of share·n, what is over the whole number
        self._above = False  # whether the count is the whole number over it; likely by _part

    def take(self) -> bool:
        """Tell whether this turn is one of the share's."""
        part = self._part + self._share
        if part < 1:
            taken = not self._above and self._chance() * (1 - self._part) < self._share
            self._above = self._above or taken
        else:  # a whole number was passed: a count that was over it is on it now
            part -= 1
            taken = not self._above or self._chance() * self._part < part
            self._above = self._above and taken
        self._part = part
        return taken


@dataclass(frozen=True, slots=True)
class _Plan:
    """Versions with their shares, the active one last, and a splitter for each but the last."""

    record: TaskRecord
    shares: tuple[tuple[str, float], ...]
    splitters: tuple[Splitter, ...]


class Traffic:
    """Splits each task's requests by the shares that its record gives to versions."""

    def __init__(self, chance: Callable[[], float] = random.random) -> None:
        """Take numbers from 0 to under 1."""
        self._chance = chance
        self._plans: dict[str, _Plan] = {}

    def choose(self, task: str, record: TaskRecord, key: str | None = None) -> str:
        """Return the version that answers a request.

        With a key always the same one, as long as the shares are the same: weighted rendezvous
        hashing by the logarithmic method (Schindelhauer and Schomaker, "Weighted distributed hash
        tables", SPAA 2005), the version of the largest share / -ln(u), where u in (0, 1) is a hash
        of task, version and key. Of two versions only the keys leave that must. Of more, where d of
        the traffic moves, up to 2d / (1 + d) of the keys do, which no choice without a memory
        betters for all changes (Angel and Spinka, "Pairwise optimal coupling of multiple random
        variables", 2019).

        Without a key by chance, yet counted: after n requests a version of two has answered less
        than 1 more or fewer than its share of n, of three less than 2, of k less than k - 1. It is
        counted for each task, in this process, and anew when the shares change.
        """
        if not record.traffic:
            return record.active
        plan = self._plan(task, record)
        if key:
            return max(plan.shares, key=lambda one: _weight(task, one[0], one[1], key))[0]
        for (version, _), splitter in zip(plan.shares, plan.splitters, strict=False):
            if splitter.take():
                return version
        return plan.shares[-1][0]

    def forget(self, task: str) -> None:
        """Drop a task's counts."""
        self._plans.pop(task, None)

    def _plan(self, task: str, record: TaskRecord) -> _Plan:
        plan = self._plans.get(task)
        if plan is not None and plan.record is record:
            return plan
        shares = _shares(record)
        if plan is not None and plan.shares == shares:
            splitters = plan.splitters  # another change of the task, which begins no new count
        else:
            left, made = 1.0, []
            for _, share in shares[:-1]:
                made.append(Splitter(min(1.0, share / left), self._chance))
                left -= share
            splitters = tuple(made)
        self._plans[task] = _Plan(record, shares, splitters)
        return self._plans[task]


def _shares(record: TaskRecord) -> tuple[tuple[str, float], ...]:
    others = {version: share for version, share in record.traffic.items() if share > _NOTHING}
    others.pop(record.active, None)
    rest = 1.0 - sum(others.values())
    return (*others.items(), *([(record.active, rest)] if rest > _NOTHING else []))


def _weight(task: str, version: str, share: float, key: str) -> float:
    told = f"{task}\0{version}\0{key}".encode("utf-8", "surrogatepass")
    number = int.from_bytes(blake2b(told, digest_size=8).digest(), "big") >> 12
    # 52 bits and a half, which a float holds: never 0 nor 1.
    return share / -math.log((number + 0.5) / 2**52)
