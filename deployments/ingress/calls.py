"""How the model is asked for a request's rows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Protocol

from adapters.rules import ProblemType
from deployments.rows import Answer, Facts
from deployments.tokens import Encoded

Answers = list[Answer]
Encodings = list[tuple[list[int], list[int] | None]]


class AskModel(Protocol):
    """How the model is asked; see `deployments.ingress.replicas.Replicas.ask`."""

    def __call__(
        self, task: str, version: str, problem_type: ProblemType, inputs: Encodings
    ) -> Awaitable[Answers]:
        """Answer inputs of one task and version."""


class Question:
    """Inputs of one version, of which each is answered by itself.

    Attributes:
        task: The task.
        version: The version that must answer.
        problem_type: How its logits become scores.
        inputs: (ids, type ids) of each.
        answers: Has all answers in the order of the inputs, once there are all; or an error.
    """

    def __init__(
        self, task: str, version: str, problem_type: ProblemType, inputs: Encodings
    ) -> None:
        """Take what is asked; needs a running event loop."""
        self.task, self.version, self.problem_type = task, version, problem_type
        self.inputs = inputs
        self.answers: asyncio.Future[Answers] = asyncio.get_running_loop().create_future()
        self._given: Answers = [""] * len(inputs)
        self._left = len(inputs)

    @property
    def over(self) -> bool:
        """Whether nobody waits for answers any more."""
        return self.answers.done()

    def answer(self, index: int, answer: Answer) -> None:
        """Take the answer of an input, which comes once."""
        self._given[index] = answer
        self._left -= 1
        if not self._left and not self.over:
            self.answers.set_result(self._given)

    def fail(self, error: Exception) -> None:
        """End all of it with an error."""
        if not self.over:
            self.answers.set_exception(error)


async def answer_rows(ask: AskModel, facts: Facts, rows: Sequence[Encoded]) -> Answers:
    """Ask the model."""
    if not rows:
        return []
    inputs = [(row.tokens.ids, row.tokens.type_ids) for row in rows]
    return await ask(facts["task"], facts["version"], facts["problem_type"], inputs)
