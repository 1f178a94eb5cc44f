"""One request for many tasks: each has an answer, or an error, of its own."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from deployments.errors import INTERNAL, BadInput, NoMatch, to_problem
from deployments.ingress.door import until
from deployments.ingress.many import ManyRequest, Match
from deployments.ingress.predict import Predictor
from deployments.ingress.readings import Readings
from deployments.ingress.tasks import Tasks

logger = logging.getLogger("ray.serve")


class FanOut:
    """Answers requests for many tasks, each as the predictor answers it alone."""

    def __init__(
        self,
        tasks: Tasks,
        predictor: Predictor,
        *,
        max_tasks: int,
        max_rows: int,
    ) -> None:
        """Take what it needs.

        Args:
            tasks: Who knows the tasks' names.
            predictor: Who answers for one of them.
            max_tasks: Most tasks a request.
            max_rows: Most inputs a request times its tasks, and most windows of all together.
        """
        self._tasks = tasks
        self._predictor = predictor
        self.limit(max_tasks, max_rows)

    def limit(self, max_tasks: int, max_rows: int) -> None:
        """Set the limits, which are as for the constructor."""
        self._max_tasks, self._max_rows = max_tasks, max_rows

    async def predict(
        self,
        request: ManyRequest,
        routing_key: str | None = None,
        deadline_s: float | None = None,
    ) -> dict[str, Any]:
        """Answer a request.

        Args:
            request: The request.
            routing_key: As `Predictor.predict`, for each of the tasks.
            deadline_s: Likewise: those that are answered by then have their answers.

        Returns:
            `answers`, by task in the order asked for, of a pattern by name: what
            `Predictor.predict` returns, or `error`, a sentence, with the `status` that the task
            alone would have been refused with, and `retry_after_s` where another try is worth it;
            `failed`, the tasks that have an error; and `timings_ms`, in `total`.

        Raises:
            BadInput: There are too many tasks, or inputs for all of them, or none.
            NoMatch: No task's name fits the pattern.
            StoreUnreachable: The store was to tell which names there are.
            TooLate: It did not in time.
        """
        started_s = time.perf_counter()
        self._predictor.check_count(request.inputs)
        async with until(deadline_s):
            names = await self._names(request.tasks)
        self._check_count(names, len(request.inputs))
        readings = Readings(self._predictor.runs, max_rows=self._max_rows // len(names))
        try:
            answers = await asyncio.gather(
                *(self._answer(name, request, routing_key, deadline_s, readings) for name in names)
            )
        finally:
            readings.close()
        return {
            "answers": dict(zip(names, answers, strict=True)),
            "failed": [name for name, one in zip(names, answers, strict=True) if "error" in one],
            "timings_ms": {"total": round(1e3 * (time.perf_counter() - started_s), 3)},
        }

    async def _answer(
        self,
        task: str,
        request: ManyRequest,
        routing_key: str | None,
        deadline_s: float | None,
        readings: Readings,
    ) -> dict[str, Any]:
        try:
            return await self._predictor.predict(
                task, request, routing_key, deadline_s, readings.run
            )
        except Exception as error:
            problem = to_problem(error)
            if problem is None:
                logger.error("predict(%r) failed among others", task, exc_info=error)
                problem = INTERNAL
        told: dict[str, Any] = {"error": problem.detail, "status": problem.status}
        if problem.retry_after_s is not None:
            told["retry_after_s"] = problem.retry_after_s
        return told

    async def _names(self, tasks: Sequence[str] | Match) -> list[str]:
        if isinstance(tasks, Match):
            known = await self._tasks.names()
            names = [name for name in known if fnmatchcase(name, tasks.match)]
            if not names:
                raise NoMatch(f"no task's name fits {tasks.match!r}; GET /v1/tasks lists them")
            return names
        if not tasks:
            raise BadInput("tasks is empty; name at least one task")
        twice = [name for name, times in Counter(tasks).items() if times > 1]
        if twice:
            raise BadInput(f"tasks names {twice[0]!r} twice; name each task once")
        return [*tasks]

    def _check_count(self, names: Sequence[str], num_inputs: int) -> None:
        if len(names) > self._max_tasks:
            raise BadInput(
                f"{len(names)} tasks are over the limit of {self._max_tasks} a request; ask them "
                "in several requests, or raise max_request_tasks"
            )
        if len(names) * num_inputs > self._max_rows:
            raise BadInput(
                f"{num_inputs} texts for each of {len(names)} tasks are over the limit of "
                f"{self._max_rows} together; send fewer texts, or ask fewer tasks at once"
            )
