"""One request's texts, read once for all the tasks that read them alike."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from deployments.errors import BadInput
from deployments.ingress.door import Visit
from deployments.ingress.inputs import Given, to_inputs
from deployments.ingress.results import Run
from deployments.ingress.runs import READING, Runs
from deployments.ingress.wire import PredictRequest
from deployments.rows import Facts
from deployments.tokens import Encoded

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
    read: asyncio.Task[_Read] | None = None


class Readings:
    """Takes one request through versions of many tasks, in the place of `Runs.run`.

    Owned by one event loop, and good for one request. A cold task holds nothing back: what it needs
    and nobody has read yet is read when it comes.
    """

    def __init__(self, runs: Runs, *, max_rows: int) -> None:
        """Take who reads and asks, and the most windows that one of the tasks may make."""
        self._runs = runs
        self._max_rows = max_rows
        self._inputs: dict[tuple[bool, bool], list[Given]] = {}
        self._readings: dict[tuple[object, ...], _Reading] = {}
        self._going: set[asyncio.Task[_Read]] = set()

    async def run(self, facts: Facts, request: PredictRequest, visit: Visit) -> Run:
        """Ask a version, beside the others.

        Raises:
            RequestError: The request cannot be answered.
            AdapterError: The version cannot be had.
        """
        inputs = self._checked(facts, request)
        started_s = time.perf_counter()
        encoded = await self._read(facts, inputs)
        tokenize_s = time.perf_counter() - started_s
        return await self._runs.answer(facts, request, inputs, encoded, tokenize_s, visit)

    def close(self) -> None:
        """Give up what is still being read."""
        for going in self._going:
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
            reading.read = asyncio.get_running_loop().create_task(self._begin(reading, inputs))
            self._going.add(reading.read)
            reading.read.add_done_callback(self._ended)
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

    def _ended(self, going: asyncio.Task[_Read]) -> None:
        self._going.discard(going)
        if not going.cancelled():
            going.exception()  # seen here, so that one that nobody waits for is no warning


def _of_tokens(facts: Facts) -> bool:
    return facts["problem_type"] == "token_classification"
