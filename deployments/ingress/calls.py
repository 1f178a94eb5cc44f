"""How the model is asked for a request's rows: in calls of which none is too large."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Protocol

from adapters.rules import Priority, ProblemType
from deployments.rows import Facts
from deployments.tokens import Encoded

# Of one handle call: its messages are capped at 4 MB in throughput mode, both ways.
MAX_CALL_TOKENS = 2**18
MAX_CALL_SCORES = 2**18

Answers = list[list[float] | list[list[float]] | str]
Encodings = list[tuple[list[int], list[int] | None]]
Asked = tuple[str, str, ProblemType, Encodings, Priority, int | None]
"""What `AskModel` is called with."""


class AskModel(Protocol):
    """How a model replica is asked; see `deployments.model.deployment.Model.predict`."""

    def __call__(
        self,
        task: str,
        version: str,
        problem_type: ProblemType,
        inputs: Encodings,
        priority: Priority,
        latency_target_ms: int | None,
    ) -> Awaitable[Answers]:
        """Answer inputs of one task and version."""


class AskTogether(Protocol):
    """How a replica is asked for several at once; see `Model.predict_together`."""

    def __call__(self, asked: Sequence[Asked]) -> Awaitable[Sequence[Answers | Exception]]:
        """Answer inputs of several tasks and versions; each has answers or an error of its own."""


async def answer_rows(ask: AskModel, facts: Facts, rows: Sequence[Encoded]) -> Answers:
    """Ask the model, in several calls if one would be too large."""
    parts = await asyncio.gather(*(ask(*to_asked(facts, part)) for part in parts_of(facts, rows)))
    return [answer for part in parts for answer in part]


def to_asked(facts: Facts, inputs: Encodings) -> Asked:
    """Return what a model is asked for a task's inputs."""
    return (
        facts["task"],
        facts["version"],
        facts["problem_type"],
        inputs,
        facts["priority"],
        facts["latency_target_ms"],
    )


def parts_of(facts: Facts, rows: Sequence[Encoded]) -> list[Encodings]:
    """Part rows into calls of which none is too large, nor its answer."""
    calls: list[Encodings] = []
    num_tokens = num_scores = 0
    for row in rows:
        length, scores = _size(facts, len(row.tokens.ids))
        num_tokens, num_scores = num_tokens + length, num_scores + scores
        if not calls or num_tokens > MAX_CALL_TOKENS or num_scores > MAX_CALL_SCORES:
            calls.append([])
            num_tokens, num_scores = length, scores
        calls[-1].append((row.tokens.ids, row.tokens.type_ids))
    return calls


def count(facts: Facts, inputs: Encodings) -> tuple[int, int]:
    """Return the tokens of inputs, and the scores that answer them."""
    sizes = [_size(facts, len(ids)) for ids, _ in inputs]
    return sum(tokens for tokens, _ in sizes), sum(scores for _, scores in sizes)


def _size(facts: Facts, length: int) -> tuple[int, int]:
    of_tokens = facts["problem_type"] == "token_classification"
    return length, len(facts["labels"]) * (length if of_tokens else 1)
