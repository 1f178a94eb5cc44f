"""Requests for tasks of several versions, from the choice to the answer."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest

from adapters.directory import Directory
from adapters.errors import (
    AdapterChanged,
    AdapterError,
    AdapterIncomplete,
    AdapterRefused,
    BankFull,
    TaskNotFound,
    VersionNotFound,
)
from deployments.errors import BadInput, NotReady, ReplicasLost
from deployments.ingress.calls import Answers, Encodings
from deployments.ingress.folders import Folders
from deployments.ingress.predict import Predictor
from deployments.ingress.routes import make_api
from deployments.ingress.tasks import Tasks
from deployments.ingress.wire import PredictRequest
from deployments.room import Room
from deployments.rows import Facts
from deployments.snapshot import Snapshot, TaskRecord
from deployments.tokens import Tokenizer

A, B, C = "aaaaaaaa", "bbbbbbbb", "cccccccc"
Record = Callable[..., TaskRecord]


@dataclass
class Model:
    """Answers by version; `errors` of a version are raised where they are said to be."""

    make_facts: Callable[..., Facts]
    cannot_describe: dict[str, Exception] = field(default_factory=dict)
    cannot_predict: dict[str, Exception] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    during: Callable[[], None] | None = None

    async def describe(self, task: str, version: str = "", rules: Any = None) -> Facts:
        if version in self.cannot_describe:
            raise self.cannot_describe[version]
        return self.make_facts(task=task, version=version, rules=f"{len(rules or {}):08}")

    async def ask(
        self, facts: Facts, inputs: Encodings, deadline_s: float | None = None
    ) -> Answers:
        version = facts["version"]
        await asyncio.sleep(0)
        if self.during is not None:
            self.during()
        if version in self.cannot_predict:
            raise self.cannot_predict[version]
        if version in self.broken:
            return ["this row broke" for _ in inputs]
        yes = {A: 0.1, B: 0.9, C: 0.6}[version]
        return [[1 - yes, yes] for _ in inputs]


@pytest.fixture
def model(make_facts: Callable[..., Facts]) -> Model:
    return Model(make_facts)


@pytest.fixture
def tasks(store: Directory, model: Model) -> Tasks:
    return Tasks(Folders(store, model.describe, settle_s=0), model.describe)


@pytest.fixture
def predictor(tasks: Tasks, model: Model, tokenizer: Tokenizer) -> Predictor:
    return Predictor(tasks, tokenizer, model.ask, Room(10**4), max_rows=100)


def install(tasks: Tasks, record: TaskRecord | None) -> None:
    known = {} if record is None else {"mood": record}
    tasks.snapshot = Snapshot(revision=tasks.snapshot.revision + 1, tasks=known)


async def ask(predictor: Predictor, *texts: str, key: str | None = None) -> dict[str, Any]:
    request = PredictRequest.model_validate({"texts": list(texts or ["w1"])})
    return await predictor.predict("mood", request, key)


async def test_an_answer_says_its_version_and_the_revision_of_its_rules(
    tasks: Tasks, predictor: Predictor, make_record: Record
) -> None:
    install(tasks, make_record(A, rules={"threshold": 0.5}))
    answer = await ask(predictor)
    assert (answer["version"], answer["rules"]) == (A, "00000001")
    assert not {"fallback_for", "stale_s"} & answer.keys()


async def test_only_versions_with_traffic_answer_each_with_its_own_scores(
    tasks: Tasks, predictor: Predictor, make_record: Record
) -> None:
    install(tasks, make_record(A, B, C, traffic={B: 0.25}, fallback=C))
    answers = [await ask(predictor) for _ in range(40)]
    assert Counter(answer["version"] for answer in answers) == {A: 30, B: 10}
    for answer in answers:
        expected = {A: "no", B: "yes"}[answer["version"]]
        assert answer["results"] == [{"prediction": expected}]


ERRORS: list[AdapterError] = [
    AdapterRefused("mood", ["no head"]), VersionNotFound("mood", A), TaskNotFound("mood"),
    AdapterIncomplete("mood", "half of it"), BankFull(A, 3), AdapterChanged("mood", A, B),
]  # fmt: skip


@pytest.mark.parametrize("where", ["cannot_describe", "cannot_predict"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_a_fallback_names_itself_and_what_it_is_for(
    tasks: Tasks, predictor: Predictor, model: Model, make_record: Record, error: AdapterError,
    where: str,
) -> None:  # fmt: skip
    setattr(model, where, {A: error})
    install(tasks, make_record(A, B, fallback=B))
    answer = await ask(predictor)
    assert (answer["version"], answer["fallback_for"]) == (B, A)
    assert answer["results"] == [{"prediction": "yes"}]
    counted = {usage.version: usage for usage in predictor.tally.take()}
    if isinstance(error, BankFull):  # no version's fault
        assert A not in counted
    else:
        assert (counted[A].num_rows, counted[A].num_errors) == (1, 1)
    assert (counted[B].num_rows, counted[B].num_errors) == (1, 0)


@pytest.mark.parametrize("where", ["cannot_describe", "cannot_predict"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_without_a_fallback_a_task_is_closed_with_503(
    tasks: Tasks, predictor: Predictor, model: Model, make_record: Record, error: AdapterError,
    where: str,
) -> None:  # fmt: skip
    setattr(model, where, {A: error})
    install(tasks, make_record(A, B))
    api = make_api(tasks, predictor, default_task=None, max_body_bytes=1024, max_upload_bytes=1024)
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=api), base_url="http://here"
    ) as http:
        response = await http.post("/v1/tasks/mood/predict", json={"text": "w1"})
    assert response.status_code == 503


async def test_a_fallback_that_fails_too_leaves_the_first_reason(
    tasks: Tasks, predictor: Predictor, model: Model, make_record: Record
) -> None:
    refusals = {version: AdapterRefused("mood", [f"no {version}"]) for version in (A, B)}
    model.cannot_describe = dict(refusals)
    install(tasks, make_record(A, B, fallback=B))
    with pytest.raises(AdapterRefused, match=f"no {A}"):
        await ask(predictor)


async def test_a_full_queue_is_no_reason_to_fall_back_nor_a_version_s_fault(
    tasks: Tasks, predictor: Predictor, model: Model, make_record: Record
) -> None:
    model.cannot_predict = {A: NotReady("the queue is full")}
    install(tasks, make_record(A, B, fallback=B))
    with pytest.raises(NotReady, match="queue"):
        await ask(predictor)
    assert predictor.tally.take() == []


async def test_what_loses_every_replica_that_it_is_sent_to_counts_against_its_version(
    tasks: Tasks, predictor: Predictor, model: Model, make_record: Record
) -> None:
    model.cannot_predict = {B: ReplicasLost("the model replica was lost")}
    install(tasks, make_record(A, B, traffic={B: 1.0}))
    with pytest.raises(NotReady, match="lost"):
        await ask(predictor, "one", "two")
    (counted,) = predictor.tally.take()
    assert (counted.version, counted.num_rows, counted.num_errors) == (B, 2, 2)


async def test_a_version_that_goes_while_it_is_asked_is_no_failure(
    tasks: Tasks, predictor: Predictor, model: Model, make_record: Record
) -> None:
    install(tasks, make_record(A))
    model.cannot_predict = {A: VersionNotFound("mood", A)}

    def switch() -> None:
        model.during = None
        install(tasks, make_record(B))

    model.during = switch
    answer = await ask(predictor)
    assert (answer["version"], "fallback_for" in answer) == (B, False)
    assert {usage.version for usage in predictor.tally.take()} == {B}


async def test_a_task_that_goes_while_it_is_asked_is_not_found(
    tasks: Tasks, predictor: Predictor, model: Model, make_record: Record
) -> None:
    install(tasks, make_record(A))
    model.cannot_predict = {A: VersionNotFound("mood", A)}
    model.during = lambda: install(tasks, make_record(A, deleted=True))
    with pytest.raises(TaskNotFound):
        await ask(predictor)


async def test_a_task_that_changes_for_ever_is_given_up(
    tasks: Tasks, predictor: Predictor, model: Model, make_record: Record
) -> None:
    num_asked = 0

    def switch() -> None:
        nonlocal num_asked
        num_asked += 1
        install(tasks, make_record(A, revision=num_asked + 1))

    install(tasks, make_record(A))
    model.cannot_predict, model.during = {A: VersionNotFound("mood", A)}, switch
    with pytest.raises(AdapterIncomplete):
        await ask(predictor)
    assert num_asked == 4


async def test_rows_and_errors_are_counted_by_version_and_taken_once(
    tasks: Tasks, predictor: Predictor, model: Model, make_record: Record,
    make_facts: Callable[..., Facts],
) -> None:  # fmt: skip
    install(tasks, make_record(A))
    await ask(predictor, "w1", "w2", "w3")
    model.broken = {A}
    await ask(predictor, "w1", "w2")
    model.cannot_predict = {A: RuntimeError("cuda")}
    with pytest.raises(RuntimeError):
        await ask(predictor, "w1")
    model.cannot_predict = {}
    with pytest.raises(BadInput):
        await predictor.predict("mood", PredictRequest.model_validate({"texts": []}))
    (usage,) = predictor.tally.take()
    assert (usage.task, usage.version, usage.num_rows, usage.num_errors) == ("mood", A, 6, 3)
    assert usage.last_used_s > 1e9
    assert predictor.tally.take() == []
    predictor.tally.put_back([usage])
    model.broken = set()
    await ask(predictor)
    (again,) = predictor.tally.take()
    assert (again.num_rows, again.num_errors) == (7, 3)


async def test_what_its_caller_is_to_blame_for_is_no_error_of_a_version(
    tasks: Tasks, predictor: Predictor, model: Model, make_record: Record,
    make_facts: Callable[..., Facts],
) -> None:  # fmt: skip
    model.make_facts = lambda **changes: make_facts(**changes, truncation=None)
    install(tasks, make_record(A))
    answer = await ask(predictor, "w1", "w2 " * 30)
    assert set(answer["results"][1]) == {"error"}
    (usage,) = predictor.tally.take()
    assert (usage.num_rows, usage.num_errors) == (1, 0)


async def test_out_of_contact_the_answer_says_for_how_long(
    store: Directory, model: Model, tokenizer: Tokenizer, make_record: Record
) -> None:
    folders = Folders(store, model.describe)
    tasks = Tasks(folders, model.describe, silent_s=lambda: 61.04, refuse_when_lost=False)
    install(tasks, make_record(A))
    answer = await ask(Predictor(tasks, tokenizer, model.ask, Room(10**4), max_rows=100))
    assert answer["stale_s"] == 61.0


async def test_the_header_holds_a_caller_to_one_version(
    tasks: Tasks, predictor: Predictor, make_record: Record
) -> None:
    install(tasks, make_record(A, B, traffic={B: 0.5}))
    api = make_api(
        tasks, predictor, default_task="mood", max_body_bytes=1024, max_upload_bytes=1024
    )
    transport = httpx2.ASGITransport(app=api)
    found: dict[str, set[str]] = {}
    async with httpx2.AsyncClient(transport=transport, base_url="http://here") as http:
        for path in ("/v1/tasks/mood/predict", "/predict"):
            for n in range(160):
                key = f"user-{n % 16}"
                response = await http.post(
                    path, json={"text": "w1"}, headers={"X-Routing-Key": key}
                )
                found.setdefault(key, set()).add(response.json()["version"])
    assert all(len(versions) == 1 for versions in found.values())
    assert set.union(*found.values()) == {A, B}
