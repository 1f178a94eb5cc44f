"""A version that is tried on what another one has answered, and answers nobody."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import NamedTuple

from adapters.errors import AdapterError
from deployments.errors import RequestError
from deployments.ingress.results import Judged, Run, to_judged
from deployments.ingress.runs import Runs
from deployments.ingress.tasks import Tasks
from deployments.ingress.traffic import Splitter
from deployments.ingress.usage import Tally
from deployments.snapshot import Shadow, TaskRecord

logger = logging.getLogger("ray.serve")

# Rows of shadows that the model has at a time, of all tasks together: as few as a forward hardly
# takes longer for. What comes while they run is left out.
_MAX_ROWS = 8
# What takes longer gives its rows' place to others.
_PATIENCE_S = 30.0
# Values of a regression are never the same to the last digit.
_SAME_VALUE = 1e-3


class _Sample(NamedTuple):
    shadow: Shadow
    splitter: Splitter


class Shadows:
    """Runs tasks' shadow versions on a sample of what was answered, and counts how they compare.

    Owned by one event loop. Nothing here is waited for, and nothing that fails here reaches a
    caller.
    """

    def __init__(self, tasks: Tasks, runs: Runs, tally: Tally) -> None:
        """Take who knows the versions, who asks them, and where it is counted."""
        self._tasks = tasks
        self._runs = runs
        self._tally = tally
        self._samples: dict[str, _Sample] = {}
        self._num_rows = 0  # on their way
        self._running: set[asyncio.Task[None]] = set()
        self._said: dict[str, tuple[str, str]] = {}

    def offer(self, record: TaskRecord | None, run: Run) -> None:
        """Take what was answered, and later run the task's shadow on it, or not."""
        if record is None or record.shadow is None:
            return
        task, shadow = run.facts["task"], record.shadow
        sample = self._samples.get(task)
        if sample is None or sample.shadow != shadow:
            sample = _Sample(shadow, Splitter(shadow.share))
            self._samples[task] = sample
        num_rows = len(run.answers)
        if (
            not sample.splitter.take()
            or shadow.version == run.facts["version"]
            or not 0 < num_rows <= _MAX_ROWS - self._num_rows
        ):
            return
        self._num_rows += num_rows
        running = asyncio.get_running_loop().create_task(self._run(task, record, shadow, run))
        self._running.add(running)
        running.add_done_callback(lambda done: self._end(done, num_rows))

    def _end(self, done: asyncio.Task[None], num_rows: int) -> None:
        self._running.discard(done)
        self._num_rows -= num_rows

    async def _run(self, task: str, record: TaskRecord, shadow: Shadow, run: Run) -> None:
        version = shadow.version
        try:
            async with asyncio.timeout(_PATIENCE_S):
                facts = await self._tasks.facts_of(task, version, record)
                own = await self._runs.run_again(facts, run, len(run.answers))
                if own is None:
                    return
                # Of classified tokens there may be thousands: too many for the event loop.
                counts = await asyncio.to_thread(_compare, run, own)
                self._tally.shadowed(task, version, *counts)
                self._said.pop(task, None)
        except (RequestError, AdapterError) as error:
            reached, failed = run.count_rows()
            if isinstance(error, AdapterError):
                self._tally.shadowed(task, version, reached - failed, 0, 0.0)
            self._say(task, version, error)
        except Exception as error:
            self._say(task, version, error)

    def _say(self, task: str, version: str, error: Exception) -> None:
        """Log a shadow that fails, once until it does not or fails otherwise."""
        said = (version, type(error).__name__)
        if self._said.get(task) != said:
            self._said[task] = said
            logger.warning("adapter=%s@%s fails as a shadow: %s", task, version, error)


def _compare(answered: Run, own: Run) -> tuple[int, int, float]:
    """Return how many inputs both were asked for, in how many they agree, and how scores moved.

    Of a row with a score that is no number nothing moved that could be summed; it does not agree.
    """
    pairs = [
        (one, other)
        for one, other in zip(to_judged(answered), to_judged(own), strict=True)
        if one is not None  # else there is nothing to agree with
    ]
    compared = [(one, other, _shift(one, other)) for one, other in pairs if other is not None]
    of_values = own.facts["problem_type"] == "regression"
    finite = [(one, other, shift) for one, other, shift in compared if math.isfinite(shift)]
    num_agreed = sum(
        shift <= _SAME_VALUE if of_values else one.prediction == other.prediction
        for one, other, shift in finite
    )
    return len(pairs), num_agreed, sum(shift for _, _, shift in finite)


def _shift(one: Judged, other: Judged) -> float:
    """Return the largest difference of a score; what only one of them has counts as 0 there.

    It is NaN if a score is.
    """
    keys = one.scores.keys() | other.scores.keys()
    shifts = [abs(one.scores.get(k, 0.0) - other.scores.get(k, 0.0)) for k in keys]
    if any(map(math.isnan, shifts)):  # which `max` finds only where it comes first
        return math.nan
    return max(shifts, default=0.0)
