"""A request through one version: its rules, tokens, and the model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from deployments.ingress.calls import AskModel, answer_rows
from deployments.ingress.door import Visit
from deployments.ingress.inputs import Given, encode, to_inputs
from deployments.ingress.results import Run
from deployments.ingress.wire import PredictRequest
from deployments.rows import Facts
from deployments.tokens import Encoded, Tokenizer

# Requests that are tokenised at a time: one is a core's work, and a large one lets small ones pass.
_ENCODERS = 2
# Characters of a whole request that are tokenised sooner than a thread is asked to (under 1 ms).
_SHORT_CHARACTERS = 1024
# What decides how a text becomes tokens. Two versions that agree in it read the same ones.
READING = ("max_length", "truncation", "stride", "pair")


class Runs:
    """Takes requests through versions whose facts are known.

    Attributes:
        max_rows: Most windows of all inputs of a request.
    """

    def __init__(self, tokenizer: Tokenizer, ask: AskModel, max_rows: int) -> None:
        """Take the base's tokenizer, who reaches a replica, and the most windows a request."""
        self._tokenizer = tokenizer
        self._ask = ask
        self.max_rows = max_rows
        # Of its own, so that looks at a slow store keep no text waiting.
        self._encoders = ThreadPoolExecutor(_ENCODERS, "encode")
        # What nobody waits for, one at a time.
        self._unhurried = ThreadPoolExecutor(1, "encode-shadow")

    async def run(self, facts: Facts, request: PredictRequest, visit: Visit | None = None) -> Run:
        """Ask a version, for a caller who visits or for the ingress itself.

        Raises:
            RequestError: The request cannot be answered.
            AdapterError: The version cannot be had.
        """
        inputs = to_inputs(facts, request)
        started_s = time.perf_counter()
        encoded = await self.read(facts, inputs, self.max_rows)
        tokenize_s = time.perf_counter() - started_s
        return await self.answer(facts, request, inputs, encoded, tokenize_s, visit)

    async def read(
        self, facts: Facts, inputs: Sequence[Given], max_rows: int
    ) -> list[list[Encoded] | str]:
        """Turn inputs into tokens, many off the event loop; see `inputs.encode`."""
        if sum(_num_characters(given) for given in inputs) <= _SHORT_CHARACTERS:
            return encode(self._tokenizer, facts, inputs, max_rows)
        return await asyncio.get_running_loop().run_in_executor(
            self._encoders, encode, self._tokenizer, facts, inputs, max_rows
        )

    async def answer(
        self,
        facts: Facts,
        request: PredictRequest,
        inputs: list[Given],
        encoded: Sequence[list[Encoded] | str],
        tokenize_s: float,
        visit: Visit | None = None,
    ) -> Run:
        """Ask a version for inputs that were read in so many seconds; raises as `run`."""
        rows = [row for windows in encoded if not isinstance(windows, str) for row in windows]
        if visit is not None:
            visit.grow(len(rows))
        started_s = time.perf_counter()
        deadline_s = None if visit is None else visit.deadline_s
        answers = await answer_rows(self._ask, facts, rows, deadline_s)
        model_s = time.perf_counter() - started_s
        return Run(facts, request, inputs, encoded, answers, tokenize_s, model_s)

    async def run_again(self, facts: Facts, run: Run, max_rows: int) -> Run | None:
        """Ask another version the same, in no hurry; None if it would be more windows than that.

        Raises:
            RequestError: The request does not fit this version.
            AdapterError: The version cannot be had.
        """
        inputs, encoded = run.inputs, run.encoded
        if not _read_alike(facts, run.facts):
            inputs = to_inputs(facts, run.request)
            encoded = await asyncio.get_running_loop().run_in_executor(
                self._unhurried, encode, self._tokenizer, facts, inputs, self.max_rows
            )
        rows = [row for windows in encoded if not isinstance(windows, str) for row in windows]
        if len(rows) > max_rows:
            return None
        answers = await answer_rows(self._ask, facts, rows)
        return Run(facts, run.request, inputs, encoded, answers, 0.0, 0.0)


def _num_characters(given: Given) -> int:
    text = given.text
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])


def _read_alike(one: Facts, other: Facts) -> bool:
    of_tokens = [facts["problem_type"] == "token_classification" for facts in (one, other)]
    return of_tokens[0] == of_tokens[1] and all(one[key] == other[key] for key in READING)  # type: ignore[literal-required]
