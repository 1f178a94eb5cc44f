"""The native call, for HTTP and handle alike: texts of one task in, a plain dict out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from adapters.errors import AdapterError, BankFull
from deployments.errors import BadInput, ReplicasLost, RequestError
from deployments.ingress.calls import AskModel
from deployments.ingress.door import Visit, until
from deployments.ingress.results import Run, to_results
from deployments.ingress.runs import Runs
from deployments.ingress.shadow import Shadows
from deployments.ingress.tasks import Choice, Tasks
from deployments.ingress.usage import Tally
from deployments.ingress.wire import PredictRequest
from deployments.room import LEAST_ROWS, Room
from deployments.rows import Facts
from deployments.tokens import Tokenizer

AskVersion = Callable[[Facts, PredictRequest, Visit], Awaitable[Run]]
"""Takes a request through a version; see `deployments.ingress.runs.Runs.run`."""


class Predictor:
    """Answers requests for any task: who answers, its rules, the model, the shape of the answer.

    Attributes:
        runs: Asks a version whose facts are known.
        tally: What was counted.
    """

    def __init__(
        self,
        tasks: Tasks,
        tokenizer: Tokenizer,
        ask: AskModel,
        room: Room,
        *,
        max_rows: int,
    ) -> None:
        """Take what it needs.

        Args:
            tasks: Who knows what a task is.
            tokenizer: The base's.
            ask: Reaches a model replica.
            room: For the rows of all requests together.
            max_rows: Most inputs a request, and most windows of all its inputs.
        """
        self.runs = Runs(tokenizer, ask, max_rows)
        self.tally = Tally()
        self._tasks = tasks
        self._room = room
        self._shadows = Shadows(tasks, self.runs, self.tally)
        self._max_rows = max_rows

    def limit(self, max_rows: int) -> None:
        """Change the most inputs a request, and the most windows of all its inputs."""
        self._max_rows = self.runs.max_rows = max_rows

    async def predict(
        self,
        task: str,
        request: PredictRequest,
        routing_key: str | None = None,
        deadline_s: float | None = None,
        ask: AskVersion | None = None,
    ) -> dict[str, Any]:
        """Answer a request.

        Args:
            task: The task.
            request: The request.
            routing_key: Requests with the same one are answered by the same version.
            deadline_s: By the event loop's clock, when its caller goes; see `door.to_deadline`.
            ask: Takes it through a version, in the place of `runs`.

        Returns:
            `task`, `version`, `rules` (the revision of them), `results` (see `wire.to_result`;
            `{"error": …}` where an input alone failed), `num_tokens` and `timings_ms`; and
            `fallback_for`, the version that was to answer and cannot, and `stale_s`, for how long
            this ingress has been out of contact with the catalog, where there is such a thing.

        Raises:
            RequestError: The request cannot be answered; Overloaded where it was not let in, and
                TooLate after its deadline.
            AdapterError: The task's adapter cannot be had.
        """
        self.check_count(request.inputs)
        choice = self._tasks.choose(task, routing_key)
        with Visit(self._room, task, len(request.inputs), deadline_s) as visit:
            async with until(deadline_s):
                return await self._answer(choice, request, routing_key, visit, ask or self.runs.run)

    async def _answer(
        self,
        choice: Choice,
        request: PredictRequest,
        routing_key: str | None,
        visit: Visit,
        ask: AskVersion,
    ) -> dict[str, Any]:
        while True:
            try:
                run = await self._run(choice, request, visit, ask)
                break
            except AdapterError as error:
                # That others are pinned in all the room there is, is no version's fault.
                if not self._tasks.is_outdated(choice) and not isinstance(error, BankFull):
                    self._count_failed(choice, request)
                choice = self._tasks.instead(choice, error, routing_key)
        if run.facts["problem_type"] == "token_classification":
            # A request may hold half a million classified tokens: too many for the event loop.
            results = await asyncio.to_thread(to_results, run)
        else:
            results = to_results(run)
        self._tally_run(run)
        self._shadows.offer(choice.record, run)
        return self._told(choice, run, results)

    def check_room(self, task: str) -> None:
        """Check that there is room for a request, before anything is done for it.

        Raises:
            Overloaded: There is none.
        """
        self._room.check(task, LEAST_ROWS)

    def check_count(self, inputs: Sequence[object]) -> None:
        """Check how many inputs there are.

        Raises:
            BadInput: There are none, or too many for a request.
        """
        if not inputs:
            raise BadInput("texts is empty; give at least one text")
        if len(inputs) > self._max_rows:
            raise BadInput(
                f"texts has {len(inputs)} entries, over the limit of {self._max_rows}; "
                "send them in several requests"
            )

    async def _run(
        self, choice: Choice, request: PredictRequest, visit: Visit, ask: AskVersion
    ) -> Run:
        facts = await self._tasks.facts(choice)
        try:
            return await ask(facts, request, visit)
        except ReplicasLost:
            self._count_failed(choice, request)
            raise
        except (RequestError, AdapterError):
            raise
        except Exception:
            self._count_failed(choice, request)
            raise

    def _told(self, choice: Choice, run: Run, results: list[dict[str, Any]]) -> dict[str, Any]:
        answer = {
            "task": choice.task,
            "version": run.facts["version"],
            "rules": run.facts["rules"],
            "results": results,
            "num_tokens": run.num_tokens,
            "timings_ms": {
                "tokenize": round(1e3 * run.tokenize_s, 3),
                "model": round(1e3 * run.model_s, 3),
            },
        }
        if choice.fallback_for is not None:
            answer["fallback_for"] = choice.fallback_for
        stale_s = self._tasks.stale_s
        if stale_s is not None:
            answer["stale_s"] = round(stale_s, 1)
        return answer

    def _tally_run(self, run: Run) -> None:
        num_rows, num_errors = run.count_rows()
        self.tally.answered(run.facts["task"], run.facts["version"], num_rows, num_errors)

    def _count_failed(self, choice: Choice, request: PredictRequest) -> None:
        """Count all inputs against the version; of a folder nobody asks for that."""
        if choice.version is not None:
            num_rows = len(request.inputs)
            self.tally.answered(choice.task, choice.version, num_rows, num_rows)
