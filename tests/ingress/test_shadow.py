import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from adapters.directory import Directory
from adapters.errors import AdapterRefused
from deployments.errors import NotReady
from deployments.ingress import shadow
from deployments.ingress.calls import Answers, Encodings
from deployments.ingress.folders import Folders
from deployments.ingress.predict import Predictor
from deployments.ingress.tasks import Tasks
from deployments.ingress.usage import Counts
from deployments.ingress.wire import PredictRequest
from deployments.room import Room
from deployments.rows import Facts
from deployments.snapshot import Snapshot, TaskRecord
from deployments.tokens import Tokenizer

A, B, C = "aaaaaaaa", "bbbbbbbb", "cccccccc"
NUM_WORDS = 1000  # of the tokenizer of these tests
Record = Callable[..., TaskRecord]


@dataclass
class Model:
    """A says by how high a word is; B says the same, less a tenth; how fast is as set."""

    make_facts: Callable[..., Facts]
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)
    error: Exception | None = None
    shadow_s: float = 0.0
    num_at_once: int = 0
    most_at_once: int = 0
    done: int = 0
    broken: dict[str, list[float]] = field(default_factory=dict)  # scores of a version

    async def describe(self, task: str, version: str = "", rules: Any = None) -> Facts:
        if version == B and isinstance(self.error, AdapterRefused):
            raise self.error
        return self.make_facts(task=task, version=version, **self.changes.get(version, {}))

    async def ask(
        self, facts: Facts, inputs: Encodings, deadline_s: float | None = None
    ) -> Answers:
        version = facts["version"]
        self.asked.append((version, len(inputs)))
        await asyncio.sleep(0)  # no model answers in the same turn of the loop
        if version == B:
            self.num_at_once += len(inputs)
            self.most_at_once = max(self.most_at_once, self.num_at_once)
            await asyncio.sleep(self.shadow_s)
            self.num_at_once -= len(inputs)
            if self.error is not None:
                raise self.error
        less = 0.1 if version == B else 0.0
        if facts["problem_type"] == "token_classification":
            return [[[w / NUM_WORDS - less, 1 - w / NUM_WORDS + less] for w in ids]
                    for ids, _ in inputs]  # fmt: skip
        if version in self.broken:
            return [self.broken[version] for _ in inputs]
        yes = [max(ids[1:-1]) / NUM_WORDS - less for ids, _ in inputs]
        return [[1 - one, one] for one in yes]

    @property
    def num_shadowed(self) -> int:
        return sum(version == B for version, _ in self.asked)


@pytest.fixture
def model(make_facts: Callable[..., Facts]) -> Model:
    return Model(make_facts)


@pytest.fixture
def tasks(store: Directory, model: Model) -> Tasks:
    return Tasks(Folders(store, model.describe, settle_s=0), model.describe)


@pytest.fixture
def predictor(tasks: Tasks, model: Model, tokenizer: Tokenizer) -> Predictor:
    return Predictor(tasks, tokenizer, model.ask, Room(10**4), max_rows=100)


@pytest.fixture
def shadowed(tasks: Tasks, make_record: Record) -> Callable[..., None]:
    """Install a record of the task whose shadow is B."""

    def shadowed(share: float = 1.0, **changes: Any) -> None:
        record = make_record(A, B, C, shadow={"version": B, "share": share}, **changes)
        tasks.snapshot = Snapshot(revision=1, tasks={"mood": record})

    return shadowed


async def ask(predictor: Predictor, *texts: Any, **others: Any) -> dict[str, Any]:
    request = PredictRequest.model_validate({"texts": list(texts), **others})
    return await predictor.predict("mood", request)


async def usage_of_shadow(predictor: Predictor, model: Model) -> Counts | None:
    """Wait until every shadow has ended, and return what was counted of it."""
    until_s = time.monotonic() + 5
    while predictor._shadows._running and time.monotonic() < until_s:
        await asyncio.sleep(0.005)
    return next((usage for usage in predictor.tally.take() if usage.version == B), None)


async def test_a_shadow_gets_what_was_answered_and_is_compared_with_it(
    predictor: Predictor, model: Model, shadowed: Callable[..., None]
) -> None:
    shadowed()
    answer = await ask(predictor, "w900", "w550", "w100")
    assert answer["version"] == A
    assert [result["prediction"] for result in answer["results"]] == ["yes", "yes", "no"]
    usage = await usage_of_shadow(predictor, model)
    assert usage is not None
    assert (usage.num_shadowed, usage.num_agreed) == (3, 2)  # 0.55 and 0.45 differ
    assert usage.score_shift == pytest.approx(0.3)
    assert (usage.num_rows, usage.last_used_s) == (0, 0)  # it answered nobody


async def test_a_slow_shadow_delays_nobody_and_its_rows_are_bounded(
    predictor: Predictor, model: Model, shadowed: Callable[..., None],
    tasks: Tasks, make_record: Record,
) -> None:  # fmt: skip
    async def seconds() -> float:
        started_s = time.monotonic()
        for _ in range(100):
            await ask(predictor, "w900", "w100")
        return time.monotonic() - started_s

    tasks.snapshot = Snapshot(revision=1, tasks={"mood": make_record(A)})
    await seconds()
    alone_s = await seconds()
    shadowed()
    model.shadow_s = 0.5
    beside_s = await seconds()
    assert beside_s < alone_s + 0.4  # 50 s if one were waited for, of 100 requests
    assert 0 < model.most_at_once <= shadow._MAX_ROWS
    assert model.num_shadowed <= 4 * (1 + beside_s / 0.5)
    await usage_of_shadow(predictor, model)
    assert predictor._shadows._num_rows == 0


async def test_a_shadow_begins_after_the_answer_is_made(
    predictor: Predictor, model: Model, shadowed: Callable[..., None]
) -> None:
    shadowed()
    await ask(predictor, "w900")
    assert model.num_shadowed == 0
    await usage_of_shadow(predictor, model)
    assert model.num_shadowed == 1


async def test_a_large_request_is_not_shadowed(
    predictor: Predictor, model: Model, shadowed: Callable[..., None]
) -> None:
    shadowed()
    await ask(predictor, *["w1"] * (shadow._MAX_ROWS + 1))
    assert await usage_of_shadow(predictor, model) is None
    await ask(predictor, *["w1"] * shadow._MAX_ROWS)
    usage = await usage_of_shadow(predictor, model)
    assert usage is not None
    assert usage.num_shadowed == shadow._MAX_ROWS


async def test_a_shadow_runs_on_its_share(
    predictor: Predictor, model: Model, shadowed: Callable[..., None]
) -> None:
    shadowed(share=0.25)
    for _ in range(80):
        await ask(predictor, "w1")
        await asyncio.sleep(0.001)  # so that none is left out for want of room
    assert abs(model.num_shadowed - 20) < 1


@pytest.mark.parametrize(
    ("error", "num_shadowed"),
    [
        (AdapterRefused("mood", ["no head"]), 2), (NotReady("the queue is full"), None),
        (RuntimeError("unknown"), None),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
async def test_a_shadow_that_fails_fails_for_nobody_and_is_logged_once(
    predictor: Predictor, model: Model, shadowed: Callable[..., None], error: Exception,
    num_shadowed: int | None, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    shadowed()
    model.error = error
    with caplog.at_level(logging.WARNING, "ray.serve"):
        for _ in range(2):
            answer = await ask(predictor, "w900")
            assert answer["results"] == [{"prediction": "yes"}]
            await asyncio.sleep(0.02)
    usage = await usage_of_shadow(predictor, model)
    # What cannot be had agrees with nothing; what was turned away says nothing.
    assert (None if usage is None else usage.num_shadowed) == num_shadowed
    assert usage is None or usage.num_agreed == 0
    (line,) = [record.message for record in caplog.records if "shadow" in record.message]
    assert f"mood@{B}" in line
    assert str(error) in line


async def test_a_shadow_reads_by_its_own_rules(
    predictor: Predictor, model: Model, shadowed: Callable[..., None]
) -> None:
    model.changes[B] = {"max_length": 4, "labels": ["yes", "no"]}
    shadowed()
    await ask(predictor, "w100 w200 w900")  # of which the shadow reads the first two
    usage = await usage_of_shadow(predictor, model)
    assert usage is not None
    # Its labels stand the other way round: 0.9 "yes" against 0.9 "yes" (1 - (0.2 - 0.1)).
    assert (usage.num_shadowed, usage.num_agreed) == (1, 1)
    assert usage.score_shift == pytest.approx(0.0)


async def test_values_of_a_regression_agree_when_they_are_close(
    predictor: Predictor, model: Model, shadowed: Callable[..., None]
) -> None:
    regression = {"problem_type": "regression", "labels": ["x", "y"]}
    model.changes = {version: regression for version in (A, B)}
    shadowed()
    await ask(predictor, "w900")
    usage = await usage_of_shadow(predictor, model)
    assert usage is not None
    assert (usage.num_shadowed, usage.num_agreed) == (1, 0)
    assert usage.score_shift == pytest.approx(0.1)


async def test_entities_agree_by_label_and_place(
    predictor: Predictor, model: Model, shadowed: Callable[..., None]
) -> None:
    of_tokens = {
        "problem_type": "token_classification", "labels": ["O", "B-X"], "aggregation": "none",
    }  # fmt: skip
    model.changes = {version: of_tokens for version in (A, B)}
    shadowed()
    await ask(predictor, "w900 w100", "w900 w550")  # w550 is an entity of the shadow alone
    usage = await usage_of_shadow(predictor, model)
    assert usage is not None
    assert (usage.num_shadowed, usage.num_agreed) == (2, 1)
    assert usage.score_shift == pytest.approx(0.1 + 0.55)


async def test_the_version_that_answered_is_not_its_own_shadow(
    predictor: Predictor, model: Model, shadowed: Callable[..., None]
) -> None:
    shadowed(traffic={B: 1.0})
    await ask(predictor, "w900")
    await asyncio.sleep(0.02)
    assert model.num_shadowed == 1  # the answer


@pytest.mark.parametrize("version", [A, B])
@pytest.mark.parametrize("scores", [[0.9, math.nan], [math.nan, math.nan], [math.inf, 0.0]])
async def test_a_score_that_is_no_number_agrees_with_nothing_and_is_in_no_sum(
    predictor: Predictor, model: Model, shadowed: Callable[..., None],
    version: str, scores: list[float],
) -> None:  # fmt: skip
    model.broken = {version: scores}
    shadowed()
    await ask(predictor, "w100")
    usage = await usage_of_shadow(predictor, model)
    assert usage is not None
    assert (usage.num_shadowed, usage.num_agreed, usage.score_shift) == (1, 0, 0.0)
