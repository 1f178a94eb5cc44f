"""The native call, for HTTP and handle alike: texts of one task in, a plain dict out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from adapters.errors import AdapterChanged
from adapters.rules import ProblemType
from deployments.errors import BadInput
from deployments.ingress.entities import find_entities
from deployments.ingress.inputs import Given, encode, to_inputs
from deployments.ingress.tasks import Tasks
from deployments.ingress.windows import combine, stitch
from deployments.ingress.wire import PredictRequest, to_result, to_token_result
from deployments.rows import Facts
from deployments.tokens import Encoded, Tokenizer

# Of one handle call: its messages are capped at 4 MB in throughput mode, both ways.
_MAX_CALL_TOKENS = 2**18
_MAX_CALL_SCORES = 2**18
# Requests that are tokenised at a time: one is a core's work, and a large one lets small ones pass.
_ENCODERS = 2

Answers = list[list[float] | list[list[float]] | str]
Encodings = list[tuple[list[int], list[int] | None]]


class AskModel(Protocol):
    """How a model replica is asked; see `deployments.model.deployment.Model.predict`."""

    def __call__(
        self, task: str, version: str, problem_type: ProblemType, inputs: Encodings
    ) -> Awaitable[Answers]:
        """Answer inputs of one task and version."""


class Predictor:
    """Answers requests for any task: rules, tokens, the model, and the shape of the answer."""

    def __init__(
        self,
        tasks: Tasks,
        tokenizer: Tokenizer,
        ask: AskModel,
        *,
        max_rows: int,
    ) -> None:
        """Take what it needs.

        Args:
            tasks: Who knows what a task is.
            tokenizer: The base's.
            ask: Reaches a model replica.
            max_rows: Most inputs a request, and most windows of all its inputs.
        """
        self._tasks = tasks
        self._tokenizer = tokenizer
        self._ask = ask
        self._max_rows = max_rows
        # Of its own, so that looks at a slow store keep no text waiting.
        self._encoders = ThreadPoolExecutor(_ENCODERS, "encode")

    async def predict(self, task: str, request: PredictRequest) -> dict[str, Any]:
        """Answer a request.

        Returns:
            `task`, `version`, `results` (see `wire.to_result`; `{"error": …}` where an input alone
            failed), `num_tokens` and `timings_ms`.

        Raises:
            RequestError: The request cannot be answered.
            AdapterError: The task's adapter cannot be had.
        """
        try:
            return await self._predict(task, request)
        except AdapterChanged:
            # The folder changed between the rules and the weights: once more with what is there.
            self._tasks.doubt(task)
            return await self._predict(task, request)

    async def _predict(self, task: str, request: PredictRequest) -> dict[str, Any]:
        self._check_count(request.inputs)
        facts = await self._tasks.get(task)
        inputs = to_inputs(facts, request)
        started_s = time.perf_counter()
        encoded = await asyncio.get_running_loop().run_in_executor(
            self._encoders, encode, self._tokenizer, facts, inputs, self._max_rows
        )
        encoded_s = time.perf_counter()
        rows = [row for windows in encoded if not isinstance(windows, str) for row in windows]
        answers = await self._answers(facts, rows)
        answered_s = time.perf_counter()
        if facts["problem_type"] == "token_classification":
            # A request may hold half a million classified tokens: too many for the event loop.
            results = await asyncio.to_thread(_results, facts, request, inputs, encoded, answers)
        else:
            results = _results(facts, request, inputs, encoded, answers)
        return {
            "task": task,
            "version": facts["version"],
            "results": results,
            "num_tokens": sum(len(row.tokens.ids) for row in rows),
            "timings_ms": {
                "tokenize": round(1e3 * (encoded_s - started_s), 3),
                "model": round(1e3 * (answered_s - encoded_s), 3),
            },
        }

    def _check_count(self, inputs: Sequence[object]) -> None:
        if not inputs:
            raise BadInput("texts is empty; give at least one text")
        if len(inputs) > self._max_rows:
            raise BadInput(
                f"texts has {len(inputs)} entries, over the limit of {self._max_rows}; "
                "send them in several requests"
            )

    async def _answers(self, facts: Facts, rows: Sequence[Encoded]) -> Answers:
        """Ask the model, in several calls if one would be too large."""
        parts = await asyncio.gather(
            *(
                self._ask(facts["task"], facts["version"], facts["problem_type"], part)
                for part in _parts(facts, rows)
            )
        )
        return [answer for part in parts for answer in part]


def _parts(facts: Facts, rows: Sequence[Encoded]) -> list[Encodings]:
    """Part rows into calls of which none is too large, nor its answer."""
    calls: list[Encodings] = []
    num_tokens = num_scores = 0
    of_tokens = facts["problem_type"] == "token_classification"
    for row in rows:
        length = len(row.tokens.ids)
        scores = len(facts["labels"]) * (length if of_tokens else 1)
        num_tokens, num_scores = num_tokens + length, num_scores + scores
        if not calls or num_tokens > _MAX_CALL_TOKENS or num_scores > _MAX_CALL_SCORES:
            calls.append([])
            num_tokens, num_scores = length, scores
        calls[-1].append((row.tokens.ids, row.tokens.type_ids))
    return calls


def _results(
    facts: Facts,
    request: PredictRequest,
    inputs: Sequence[Given],
    encoded: Sequence[list[Encoded] | str],
    answers: Answers,
) -> list[dict[str, Any]]:
    """Shape the answer of each input, or say why it has none."""
    results: list[dict[str, Any]] = []
    rest = iter(answers)
    for given, windows in zip(inputs, encoded, strict=True):
        own = [windows] if isinstance(windows, str) else [next(rest) for _ in windows]
        problem = next((answer for answer in own if isinstance(answer, str)), None)
        if isinstance(windows, str) or problem is not None:
            results.append({"error": problem})
            continue
        result = _result(facts, request, given, windows, own)
        if len(windows) > 1:
            result["windows"] = len(windows)
        elif windows[0].truncated:
            result["truncated"] = True
        if given.num_replaced:
            result["replaced_characters"] = given.num_replaced
        results.append(result)
    return results


def _result(
    facts: Facts,
    request: PredictRequest,
    given: Given,
    windows: Sequence[Encoded],
    answers: list[Any],  # as `Answers`, by problem type
) -> dict[str, Any]:
    if facts["aggregation"] is not None and isinstance(given.text, str):
        pieces = stitch(windows, answers)
        entities = find_entities(pieces, facts["labels"], facts["aggregation"])
        return to_token_result(facts, given.text, entities, threshold=request.threshold)
    return to_result(
        facts,
        combine(facts, answers),
        return_scores=request.return_scores,
        threshold=request.threshold,
    )
