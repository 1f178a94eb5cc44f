"""One request for many tasks: each is answered as if it had been asked alone."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest

from adapters.directory import Directory
from adapters.errors import AdapterRefused, TaskNotFound
from deployments.errors import BadInput, NoMatch, NotReady
from deployments.ingress import outbox, replicas
from deployments.ingress.fanout import FanOut
from deployments.ingress.folders import Folders
from deployments.ingress.many import ManyRequest, to_many_request
from deployments.ingress.predict import Predictor
from deployments.ingress.replicas import Replicas
from deployments.ingress.tasks import Tasks
from deployments.room import Room
from deployments.rows import Answer, Facts, Parcel, Reply
from deployments.snapshot import Snapshot, TaskRecord
from deployments.tokens import Tokenizer

A, B, C = "aaaaaaaa", "bbbbbbbb", "cccccccc"
NUM_WORDS = 1000
MAX_ROWS = 100
PAIR = {"text": "w1", "text_pair": "w2"}
NAMES = ["mood", "names", "nli", "price", "topic"]
RULES: dict[str, dict[str, Any]] = {
    "mood": {},
    "topic": {"labels": ["a", "b"], "threshold": 1.0},
    "names": {
        "problem_type": "token_classification", "labels": ["O", "B-X"], "aggregation": "none",
    },
    "price": {"problem_type": "regression", "labels": ["x", "y"]},
    "nli": {"pair": True},
    "short": {"max_length": 4},
    "whole": {"truncation": None, "overflow": "refuse"},
    "windows": {"overflow": "windows", "stride": 2, "window_scores": "mean"},
}  # fmt: skip


@dataclass
class Model:
    """Scores a row by its highest word; one in `errors` fails, one in `cold` waits for `warm`."""

    make_facts: Callable[..., Facts]
    calls: list[list[Parcel]] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)
    errors: dict[str, Exception] = field(default_factory=dict)
    cold: set[str] = field(default_factory=set)
    warm: asyncio.Event = field(default_factory=asyncio.Event)
    lost: bool = False
    hung: bool = False

    async def describe(self, task: str, version: str = C, rules: Any = None) -> Facts:
        if task not in RULES:
            raise TaskNotFound(task)
        if task in self.cold:
            await self.warm.wait()
        return self.make_facts(task=task, version=version, **RULES[task])

    async def publish(self, heard: dict[str, int]) -> list[tuple[str, None]]:
        if self.lost:
            raise NotReady("there is none")
        return [("r", None)]

    async def exchange(
        self, replica: str, ingress: str, heard: int, parcels: Sequence[Parcel], gone: Sequence[int]
    ) -> Reply:
        self.calls.append([*parcels])
        self.gone += gone
        await asyncio.sleep(3600 if parcels and self.hung else 0.01)
        reply: Reply = {"replica": "r", "answers": [], "failed": [], "residency": None}
        for parcel in parcels:
            error = self.errors.get(f"{parcel.task}@{parcel.version}", self.errors.get(parcel.task))
            if error is not None:
                reply["failed"].append(([row[0] for row in parcel.rows], error))
                continue
            kind = parcel.problem_type
            reply["answers"] += [(row[0], scores(kind, row[1])) for row in parcel.rows]
        return reply


def scores(problem_type: str, ids: list[int]) -> Answer:
    if problem_type == "token_classification":
        return [[w / 1003, 1 - w / 1003] for w in ids]
    highest = max(ids[1:-1], default=0) / NUM_WORDS
    return [highest, 1 - highest]


@pytest.fixture
def model(make_facts: Callable[..., Facts]) -> Model:
    return Model(make_facts)


@pytest.fixture
def tasks(store: Directory, model: Model, make_record: Callable[..., TaskRecord]) -> Tasks:
    tasks = Tasks(Folders(store, model.describe, settle_s=0), model.describe)
    records = {name: make_record(A, B) for name in RULES}
    tasks.snapshot = Snapshot(revision=1, tasks=records)
    return tasks


@pytest.fixture
def predictor(tasks: Tasks, model: Model, tokenizer: Tokenizer) -> Predictor:
    return Predictor(tasks, tokenizer, Replicas(model).ask, Room(10**4), max_rows=MAX_ROWS)


@pytest.fixture
def fan_out(tasks: Tasks, predictor: Predictor) -> FanOut:
    return FanOut(tasks, predictor, max_tasks=8, max_rows=MAX_ROWS)


def request(tasks: Any, *texts: Any, **others: Any) -> ManyRequest:
    return ManyRequest.model_validate({"tasks": tasks, "texts": list(texts), **others})


def told(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what no two have in common."""
    assert set(answer["timings_ms"]) == {"tokenize", "model"}
    return {name: value for name, value in answer.items() if name != "timings_ms"}


@pytest.mark.parametrize("others", [{}, {"return_scores": True}, {"threshold": 0.4}])
async def test_each_answer_is_the_task_s_own(
    fan_out: FanOut, predictor: Predictor, others: dict[str, Any]
) -> None:
    names = ["topic", "mood", "names", "short", "whole", "windows"]
    asked = request(names, "w1 w900", "w300 w2 \ud800", "w400 " * 30, "", **others)
    answer = await fan_out.predict(asked)
    assert list(answer["answers"]) == names
    assert answer["failed"] == []
    assert answer["timings_ms"]["total"] > 0
    for name in names:
        alone = await predictor.predict(name, asked)
        assert told(answer["answers"][name]) == told(alone)


async def test_all_rows_leave_in_one_call(fan_out: FanOut, model: Model) -> None:
    names = ["topic", "mood", "names", "short", "price", "windows"]
    for _ in range(2):  # known or not
        model.calls.clear()
        answer = await fan_out.predict(request(names, "w1 w2", "w3"))
        assert answer["failed"] == []
        (call,) = model.calls
        assert sorted(one.task for one in call) == sorted(names)


async def test_texts_are_read_once_where_the_rules_agree(
    fan_out: FanOut, predictor: Predictor, model: Model, tokenizer: Tokenizer
) -> None:
    names = ["topic", "mood", "names", "price"]
    with patch.object(tokenizer, "_read", wraps=tokenizer._read) as read:
        await fan_out.predict(request(names, "w1 w2", "w3"))
        assert [one.args for one in read.call_args_list] == [(["w1 w2", "w3"], True)]
        (call,) = model.calls
        # The very same lists, which go over the wire once.
        assert len({id(row[1]) for parcel in call for row in parcel.rows}) == 2
        read.reset_mock()
        await fan_out.predict(request(["topic", "short", "windows", "mood"], "w1 w2"))
        assert read.call_count == 3
        assert not any(spans for _, spans in (one.args for one in read.call_args_list))


async def test_a_cold_task_holds_nothing_back_and_reads_again_what_it_needs(
    fan_out: FanOut, predictor: Predictor, model: Model
) -> None:
    model.cold = {"names"}
    asked = request(["mood", "names", "topic"], "w900 w100")
    going = asyncio.ensure_future(fan_out.predict(asked))
    async with asyncio.timeout(5):
        while not model.calls:
            await asyncio.sleep(0.001)
        model.warm.set()
        answer = await going
    assert answer["failed"] == []
    assert [[one.task for one in call] for call in model.calls] == [["mood", "topic"], ["names"]]
    for name, one in answer["answers"].items():
        assert told(one) == told(await predictor.predict(name, asked))


async def test_what_fails_fails_alone(fan_out: FanOut, model: Model) -> None:
    model.errors = {
        "topic": AdapterRefused("topic", ["no head"]), "short": ValueError("a secret"),
        "whole": NotReady("the model's queue is full"),
    }  # fmt: skip
    names = ["nope", "topic", "mood", "nli", "short", "price", "whole", "../mood"]
    answer = await fan_out.predict(request(names, "w1", threshold=0.5))
    answers = answer["answers"]
    assert list(answers) == names
    assert answer["failed"] == [name for name in names if name != "mood"]
    assert answers["mood"]["results"] == [{"prediction": "yes"}]
    assert [answers[name].get("status") for name in names] == [
        404, 503, None, 422, 500, 422, 503, 404,
    ]  # fmt: skip
    assert "there is no task 'nope'" in answers["nope"]["error"]
    assert "no head" in answers["topic"]["error"]
    assert 'must be {"text": …, "text_pair": …}' in answers["nli"]["error"]
    assert "is a regression and takes no threshold" in answers["price"]["error"]
    assert "secret" not in str(answer)
    assert answers["whole"]["retry_after_s"] == 1
    assert "retry_after_s" not in answers["nope"]


async def test_pairs_are_for_tasks_of_pairs(fan_out: FanOut) -> None:
    answer = await fan_out.predict(request(NAMES, PAIR))
    assert answer["failed"] == [name for name in NAMES if name != "nli"]
    assert len(answer["answers"]["nli"]["results"]) == 1


async def test_when_no_replica_answers_each_task_says_so(
    fan_out: FanOut, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "_PATIENCE_S", 0.01)
    model.lost = True
    answer = await fan_out.predict(request(["mood", "topic"], "w1"))
    assert answer["failed"] == ["mood", "topic"]
    assert {one["error"] for one in answer["answers"].values()} == {"no model replica is running"}


async def test_a_fallback_answers_beside_the_others(
    fan_out: FanOut, tasks: Tasks, predictor: Predictor, model: Model,
    make_record: Callable[..., TaskRecord],
) -> None:  # fmt: skip
    records = {"mood": make_record(A, B, fallback=B), "topic": make_record(A)}
    tasks.snapshot = Snapshot(revision=2, tasks=records)
    model.errors = {f"mood@{A}": AdapterRefused("mood", ["no head"])}
    answer = await fan_out.predict(request(["mood", "topic"], "w1", "w2"))
    assert answer["failed"] == []
    mood = answer["answers"]["mood"]
    assert (mood["version"], mood["fallback_for"]) == (B, A)
    counted = {(one.task, one.version): one for one in predictor.tally.take()}
    assert counted["mood", A].num_errors == counted["mood", A].num_rows == 2
    assert (counted["mood", B].num_rows, counted["mood", B].num_errors) == (2, 0)
    assert counted["topic", A].num_rows == 2


async def test_traffic_is_split_by_the_key(
    fan_out: FanOut, tasks: Tasks, predictor: Predictor, make_record: Callable[..., TaskRecord]
) -> None:
    tasks.snapshot = Snapshot(
        revision=2, tasks={n: make_record(A, B, traffic={B: 0.5}) for n in ("mood", "topic")}
    )
    found = set()
    for n in range(20):
        answer = await fan_out.predict(request(["mood", "topic"], "w1"), f"user-{n}")
        for name, one in answer["answers"].items():
            alone = await predictor.predict(name, request([name], "w1"), f"user-{n}")
            assert alone["version"] == one["version"]
            found.add(one["version"])
    assert found == {A, B}


async def test_a_shadow_runs_beside_an_answer_of_many(
    fan_out: FanOut, tasks: Tasks, predictor: Predictor, make_record: Callable[..., TaskRecord]
) -> None:
    record = make_record(A, B, shadow={"version": B, "share": 1.0})
    tasks.snapshot = Snapshot(revision=2, tasks={"mood": record, "topic": make_record(A)})
    await fan_out.predict(request(["mood", "topic"], "w1", "w2"))
    await asyncio.sleep(0.05)
    counted = {(one.task, one.version): one for one in predictor.tally.take()}
    shadowed = counted["mood", B]
    assert (shadowed.num_shadowed, shadowed.num_agreed) == (2, 2)


async def test_a_pattern_names_tasks_of_the_catalog_and_folders(
    fan_out: FanOut, tasks: Tasks, write: Callable[..., Any],
    make_record: Callable[..., TaskRecord],
) -> None:  # fmt: skip
    gone = make_record(A, deleted=True)
    tasks.snapshot = Snapshot(revision=2, tasks={"nli": gone, "names": make_record(A)})
    write("mood")
    write("nowhere")
    answer = await fan_out.predict(request({"match": "n*"}, "w1"))
    assert list(answer["answers"]) == ["names", "nowhere"]
    assert answer["failed"] == ["nowhere"]
    answer = await fan_out.predict(request({"match": "?oo[a-d]"}, "w1"))
    assert list(answer["answers"]) == ["mood"]
    assert answer["answers"]["mood"]["version"] == C
    with pytest.raises(NoMatch, match=r"no task's name fits 'guard-\*'; GET /v1/tasks lists"):
        await fan_out.predict(request({"match": "guard-*"}, "w1"))


@pytest.mark.parametrize(
    ("names", "num_texts", "said"),
    [
        ([], 1, "tasks is empty"), (["mood", "topic", "mood"], 1, "tasks names 'mood' twice"),
        (["mood"], 0, "texts is empty"), (["mood"], 101, "101 entries, over the limit of 100"),
        (NAMES, 21, "21 texts for each of 5 tasks are over the limit of 100 together"),
        ([f"t{n}" for n in range(9)], 1, "9 tasks are over the limit of 8 a request"),
    ],
)  # fmt: skip
async def test_what_is_too_much_or_nothing_is_refused_whole(
    fan_out: FanOut, model: Model, names: list[str], num_texts: int, said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        await fan_out.predict(request(names, *["w1"] * num_texts))
    assert model.calls == []


async def test_a_pattern_of_too_many_tasks_is_refused(
    fan_out: FanOut, tasks: Tasks, make_record: Callable[..., TaskRecord]
) -> None:
    records = {f"guard-{n}": make_record(A) for n in range(9)}
    tasks.snapshot = Snapshot(revision=2, tasks=records)
    with pytest.raises(BadInput, match="9 tasks are over the limit of 8"):
        await fan_out.predict(request({"match": "guard-*"}, "w1"))


async def test_each_task_may_make_its_share_of_windows(fan_out: FanOut) -> None:
    long = "w1 " * 300  # 25 windows
    names = ["windows", "mood", "topic"]
    assert (await fan_out.predict(request(names, long)))["failed"] == []
    answer = await fan_out.predict(request([*names, "names", "price"], long))
    assert answer["failed"] == ["windows"]
    said = answer["answers"]["windows"]
    assert said["status"] == 422
    assert "more than 20 windows of 16 tokens, a task's share" in said["error"]


async def test_no_call_is_too_large(
    fan_out: FanOut, predictor: Predictor, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_MAX_CALL_TOKENS", 10)  # a task's row has 4
    names = ["mood", "names", "topic", "price"]
    asked = request(names, "w1 w2")
    answer = await fan_out.predict(asked)
    assert [len(call) for call in model.calls if call] == [2, 2]
    for name in names:
        assert told(answer["answers"][name]) == told(await predictor.predict(name, asked))


async def test_a_caller_who_goes_away_leaves_nothing_behind(fan_out: FanOut, model: Model) -> None:
    await fan_out.predict(request(["mood"], "w1"))
    model.calls.clear()
    model.hung = True
    going = asyncio.ensure_future(fan_out.predict(request(["mood", "topic"], "w1")))
    async with asyncio.timeout(5):
        while not model.calls:
            await asyncio.sleep(0.001)
        going.cancel()
        with pytest.raises(asyncio.CancelledError):
            await going
        while len(model.gone) < 2:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("given", [["mood", "topic"], ("mood", "topic")])
def test_a_handle_s_names_come_in_a_list_or_tuple(given: Any) -> None:
    asked = to_many_request(given, "w1", return_scores=False, threshold=None)
    assert asked.tasks == ["mood", "topic"]


def test_a_handle_s_single_name_is_one_task() -> None:
    asked = to_many_request("mood", ["w1"], return_scores=False, threshold=None)
    assert asked.tasks == ["mood"]


@pytest.mark.parametrize(
    "tasks",
    [
        None, [3], {}, {"like": "a*"}, {"match": 3}, {"match": "a", "not": "b"}, b"mood",
        {"match": "a" * 257}, ["mood", "a" * 257], ["\ud800"], {"match": "\udfff*"},
    ],
)  # fmt: skip
def test_tasks_that_are_none_are_refused_in_one_sentence(tasks: Any) -> None:
    with pytest.raises(BadInput) as caught:
        to_many_request(tasks, "w1", return_scores=False, threshold=None)
    assert str(caught.value).startswith('tasks: give a list of names, or {"match": "guard-*"}')
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 100
