"""The tasks of one request on their way: texts are read once, and their rows leave together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from deployments.errors import BadInput
from deployments.ingress.calls import (
    MAX_CALL_SCORES,
    MAX_CALL_TOKENS,
    Answers,
    Asked,
    AskTogether,
    count,
    parts_of,
    to_asked,
)
from deployments.ingress.inputs import Given, to_inputs
from deployments.ingress.results import Run
from deployments.ingress.runs import READING, Runs
from deployments.ingress.wire import PredictRequest
from deployments.rows import Facts
from deployments.tokens import Encoded

# What is ready waits so long for the rest, of which some may be cold.
_PATIENCE_S = 0.005

T = TypeVar("T")
_Read = Sequence[list[Encoded] | str]


@dataclass(slots=True)
class _Reading:
    """Texts as the tasks of some rules read them.

    Attributes:
        facts: One of these tasks; one whose tokens are classified, if there is any.
        begun: Whether it is too late to take another one.
        read: What comes of it.
    """

    facts: Facts
    begun: bool = False
    read: asyncio.Future[_Read] | None = None


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A part of a task's rows before it is sent, with its tokens and the scores to come."""

    asked: Asked
    num_tokens: int
    num_scores: int
    answers: asyncio.Future[Answers]


class Together:
    """Takes one request through versions of many tasks, in the place of `Runs.run`.

    Owned by one event loop, and good for one request. Versions whose rules agree on how texts are
    read share the reading. Rows leave when those of all tasks are there, or have turned out not to
    come, or 5 ms after the first of them: a cold task holds nothing else back for longer.
    """

    def __init__(
        self, runs: Runs, ask: AskTogether, tasks: Iterable[str], *, max_rows: int
    ) -> None:
        """Begin.

        Args:
            runs: Reads texts.
            ask: Reaches a model replica.
            tasks: Whose rows are to come.
            max_rows: Most windows that one of them may make.
        """
        self._runs = runs
        self._ask = ask
        self._max_rows = max_rows
        self._coming = set(tasks)
        self._inputs: dict[tuple[bool, bool], list[Given]] = {}
        self._readings: dict[tuple[object, ...], _Reading] = {}
        self._waiting: list[_Waiting] = []
        self._timer: asyncio.TimerHandle | None = None
        self._going: set[asyncio.Task[Any]] = set()

    async def run(self, facts: Facts, request: PredictRequest) -> Run:
        """Ask a version, beside the others.

        Raises:
            RequestError: The request cannot be answered.
            AdapterError: The version cannot be had.
        """
        inputs = self._checked(facts, request)
        started_s = time.perf_counter()
        encoded = await self._read(facts, inputs)
        encoded_s = time.perf_counter()
        rows = [row for windows in encoded if not isinstance(windows, str) for row in windows]
        parts = await asyncio.gather(*self._hand_in(facts, rows))
        answered_s = time.perf_counter()
        answers = [answer for part in parts for answer in part]
        return Run(
            facts, request, inputs, encoded, answers, encoded_s - started_s, answered_s - encoded_s
        )

    def leave(self, task: str) -> None:
        """Wait no longer for a task's rows."""
        self._coming.discard(task)
        if not self._coming:
            self._send()

    def close(self) -> None:
        """Give up whatever is still on its way."""
        if self._timer is not None:
            self._timer.cancel()
        for going in [*self._going]:
            going.cancel()

    def _checked(self, facts: Facts, request: PredictRequest) -> list[Given]:
        """Return the request's inputs as `to_inputs` does, once for all that take the same."""
        kind = (facts["pair"], facts["problem_type"] == "regression")
        if kind not in self._inputs:
            self._inputs[kind] = to_inputs(facts, request)
        return self._inputs[kind]

    async def _read(self, facts: Facts, inputs: Sequence[Given]) -> _Read:
        key = tuple(facts[name] for name in READING)  # type: ignore[literal-required]
        reading = self._readings.get(key)
        if reading is not None and _of_tokens(facts) and not _of_tokens(reading.facts):
            if reading.begun:
                reading = None  # it leaves out what entities need
            else:
                reading.facts = facts
        if reading is None:
            # A task of its own begins when all that are known by now have come this far.
            reading = self._readings[key] = _Reading(facts)
            reading.read = self._go(self._begin(reading, inputs))
        assert reading.read is not None
        try:
            return await asyncio.shield(reading.read)
        except BadInput:
            raise BadInput(
                f"the texts make more than {self._max_rows} windows of {facts['max_length']} "
                "tokens, a task's share of what a request may make; send fewer texts, or ask "
                "fewer tasks at once"
            ) from None

    async def _begin(self, reading: _Reading, inputs: Sequence[Given]) -> _Read:
        reading.begun = True
        return await self._runs.read(reading.facts, inputs, self._max_rows)

    def _hand_in(self, facts: Facts, rows: Sequence[Encoded]) -> list[asyncio.Future[Answers]]:
        """Return what will hold the answers of rows, part by part; they leave with the others'."""
        loop = asyncio.get_running_loop()
        handed = [
            _Waiting(
                to_asked(facts, part),
                *count(facts, part),
                loop.create_future(),
            )
            for part in parts_of(facts, rows)
        ]
        self._waiting += handed
        self.leave(facts["task"])
        if self._waiting and self._timer is None:
            self._timer = loop.call_later(_PATIENCE_S, self._send)
        return [one.answers for one in handed]

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, []
        call: list[_Waiting] = []
        num_tokens = num_scores = 0
        for one in waiting:
            num_tokens, num_scores = num_tokens + one.num_tokens, num_scores + one.num_scores
            if call and (num_tokens > MAX_CALL_TOKENS or num_scores > MAX_CALL_SCORES):
                self._go(self._exchange(call))
                call, num_tokens, num_scores = [], one.num_tokens, one.num_scores
            call.append(one)
        if call:
            self._go(self._exchange(call))

    async def _exchange(self, call: Sequence[_Waiting]) -> None:
        """Send what waits, and give each its answers or its own error."""
        told: Sequence[Answers | Exception]
        try:
            told = await self._ask([one.asked for one in call])
        except Exception as error:  # of the whole call, so of each of them
            told = [error] * len(call)
        for one, answers in zip(call, told, strict=True):
            if one.answers.done():  # its caller has gone
                continue
            if isinstance(answers, Exception):
                one.answers.set_exception(answers)
            else:
                one.answers.set_result(answers)

    def _go(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        going = asyncio.get_running_loop().create_task(work)
        self._going.add(going)
        going.add_done_callback(self._gone)
        return going

    def _gone(self, going: asyncio.Task[Any]) -> None:
        self._going.discard(going)
        if not going.cancelled():
            going.exception()  # seen here, so that one that nobody waits for is no warning


def _of_tokens(facts: Facts) -> bool:
    return facts["problem_type"] == "token_classification"
