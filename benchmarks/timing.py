"""Times that can be compared on a shared machine: taken in turns, and told as medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Seconds = dict[str, list[float]]


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that a work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turns(works: Mapping[str, Callable[[], object]], rounds: int) -> Seconds:
    """Run each work once to warm up, then A B C A B C …; return the seconds of every run."""
    for work in works.values():
        work()
    taken: Seconds = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(timed(work))
    return taken


def ratio(taken: Seconds, of: str, to: str) -> float:
    """Median over the rounds of one work's time by another's, both of the same round.

    What slows the machine for a while slows both.
    """
    return statistics.median(a / b for a, b in zip(taken[of], taken[to], strict=True))
