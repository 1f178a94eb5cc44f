"""What the model is asked for a request's rows, and how its answers come back."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Sequence
from typing import Protocol

from deployments.rows import Answer, Facts
from deployments.tokens import Encoded

Answers = list[Answer]
Encodings = list[tuple[list[int], list[int] | None]]


class AskModel(Protocol):
    """How model replicas are asked; see `deployments.ingress.replicas.Replicas.ask`."""

    def __call__(
        self, facts: Facts, inputs: Encodings, deadline_s: float | None = None
    ) -> Awaitable[Answers]:
        """Answer inputs of one version, until a time by the event loop's clock."""


_numbers = itertools.count(1)


class Question:
    """Inputs of one version, of which each is answered by itself.

    Attributes:
        number: Its own in this process.
        facts: The version that must answer, and its rules.
        inputs: (ids, type ids) of each.
        deadline_s: By the event loop's clock, when nobody waits any more; None if there is none.
        sent: The ids of its rows that have left for a replica, of all outboxes.
        answers: Has all answers in the order of the inputs, once there are all; or an error.
    """

    def __init__(self, facts: Facts, inputs: Encodings, deadline_s: float | None = None) -> None:
        """Take what is asked; needs a running event loop."""
        self.number = next(_numbers)
        self.facts = facts
        self.inputs = inputs
        self.deadline_s = deadline_s
        self.sent: list[int] = []
        self.answers: asyncio.Future[Answers] = asyncio.get_running_loop().create_future()
        self._given: Answers = [""] * len(inputs)
        self._left = len(inputs)

    @property
    def over(self) -> bool:
        """Whether nobody waits for answers any more."""
        return self.answers.done()

    @property
    def name(self) -> str:
        """`task@version`."""
        return f"{self.facts['task']}@{self.facts['version']}"

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


async def answer_rows(
    ask: AskModel, facts: Facts, rows: Sequence[Encoded], deadline_s: float | None = None
) -> Answers:
    """Ask the model."""
    if not rows:
        return []
    return await ask(facts, [(row.tokens.ids, row.tokens.type_ids) for row in rows], deadline_s)


def is_cancelled() -> bool:
    """Tell whether somebody cancels the current task; if not, Ray Serve has cancelled a call."""
    current = asyncio.current_task()
    return current is None or current.cancelling() > 0
