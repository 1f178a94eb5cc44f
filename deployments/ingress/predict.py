"""The native call, for HTTP and handle alike: texts of one task in, a plain dict out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

from adapters.errors import AdapterChanged
from adapters.rules import ProblemType
from deployments.errors import BadInput
from deployments.ingress.tasks import Tasks
from deployments.ingress.wire import Pair, PredictRequest, to_result
from deployments.rows import Facts
from deployments.tokens import Encoded, Input, Tokenizer

# Of one handle call: its messages are capped at 4 MB in throughput mode, both ways.
_MAX_CALL_TOKENS = 2**18
_MAX_CALL_SCORES = 2**18

Answers = list[list[float] | str]
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
            max_rows: Most inputs a request.
        """
        self._tasks = tasks
        self._tokenizer = tokenizer
        self._ask = ask
        self._max_rows = max_rows

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
        inputs = _to_inputs(facts, request)
        tokenizer = self._tokenizer
        started_s = time.perf_counter()
        encoded = await asyncio.to_thread(_encode, tokenizer, facts, inputs)
        encoded_s = time.perf_counter()
        fitting = [given for given in encoded if isinstance(given, Encoded)]
        answers = iter(await self._answers(facts, fitting))
        answered_s = time.perf_counter()
        return {
            "task": task,
            "version": facts["version"],
            "results": [
                _result(facts, given, next(answers), request)
                if isinstance(given, Encoded)
                else {"error": given}
                for given in encoded
            ],
            "num_tokens": sum(len(given.tokens.ids) for given in fitting),
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

    async def _answers(self, facts: Facts, encoded: list[Encoded]) -> Answers:
        """Ask the model, in several calls if one would be too large."""
        calls: list[Encodings] = []
        call: Encodings = []
        tokens = 0
        max_rows = max(1, _MAX_CALL_SCORES // len(facts["labels"]))
        for given in encoded:
            size = len(given.tokens.ids)
            if call and (tokens + size > _MAX_CALL_TOKENS or len(call) == max_rows):
                calls.append(call)
                call, tokens = [], 0
            call.append((given.tokens.ids, given.tokens.type_ids))
            tokens += size
        calls += [call] if call else []
        parts = await asyncio.gather(
            *(
                self._ask(facts["task"], facts["version"], facts["problem_type"], part)
                for part in calls
            )
        )
        return [answer for part in parts for answer in part]


def _to_inputs(facts: Facts, request: PredictRequest) -> list[Input]:
    """Check every input against the task's rules."""
    if request.threshold is not None and facts["problem_type"] == "regression":
        raise BadInput(f"task {facts['task']!r} is a regression and takes no threshold")
    inputs: list[Input] = []
    for index, given in enumerate(request.inputs):
        if facts["pair"] != isinstance(given, Pair):
            form = '{"text": …, "text_pair": …}' if facts["pair"] else "a string"
            raise BadInput(f"texts[{index}] must be {form} for task {facts['task']!r}")
        parts = (given.text, given.text_pair) if isinstance(given, Pair) else (given,)
        try:
            "".join(parts).encode()
        except UnicodeEncodeError:
            raise BadInput(f"texts[{index}] has half a surrogate pair, which is no text") from None
        inputs.append(parts[0] if len(parts) == 1 else (parts[0], parts[1]))
    return inputs


def _encode(tokenizer: Tokenizer, facts: Facts, inputs: list[Input]) -> list[Encoded | str]:
    """Turn inputs into tokens; a sentence stands where one cannot be."""
    max_length = facts["max_length"]
    encoded: list[Encoded | str] = []
    try:
        encoded += tokenizer.encode(inputs, max_length, facts["truncation"])
    except ValueError:
        # One of them cannot be cut; find out which, so that it fails alone.
        for given in inputs:
            try:
                encoded += tokenizer.encode([given], max_length, facts["truncation"])
            except ValueError as error:
                encoded.append(str(error))
    return [_refuse_long(e, max_length) if isinstance(e, Encoded) else e for e in encoded]


def _refuse_long(encoded: Encoded, max_length: int) -> Encoded | str:
    if len(encoded.tokens.ids) > max_length:
        return (
            f"{encoded.num_tokens} tokens are over the task's max_length of {max_length}, "
            "and its rules do not allow to cut them"
        )
    return encoded


def _result(
    facts: Facts, given: Encoded, answer: list[float] | str, request: PredictRequest
) -> dict[str, Any]:
    if isinstance(answer, str):
        return {"error": answer}
    result = to_result(
        facts, answer, return_scores=request.return_scores, threshold=request.threshold
    )
    if given.truncated:
        result["truncated"] = True
    return result
