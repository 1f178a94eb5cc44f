import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from adapters.directory import Directory
from adapters.errors import (
    AdapterError,
    AdapterIncomplete,
    AdapterRefused,
    TaskNotFound,
    VersionNotFound,
)
from deployments.errors import NotReady
from deployments.ingress.folders import Folders
from deployments.ingress.tasks import Tasks
from deployments.rows import Facts
from deployments.snapshot import Snapshot, TaskRecord

A, B, C = "aaaaaaaa", "bbbbbbbb", "cccccccc"
Record = Callable[..., TaskRecord]


@dataclass
class Model:
    """Describes folders as they are, and versions as they were named, and counts both."""

    store: Directory
    make_facts: Callable[..., Facts]
    asked: list[tuple[str, str | None, dict[str, Any]]] = field(default_factory=list)
    errors: dict[str, Exception] = field(default_factory=dict)
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def describe(
        self, task: str, version: str | None = None, rules: dict[str, Any] | None = None
    ) -> Facts:
        self.asked.append((task, version, rules or {}))
        await self.open.wait()
        if version in self.errors:
            raise self.errors[version]
        found = version or self.store.read(task).version
        return self.make_facts(task=task, version=found, **rules or {})

    @property
    def versions(self) -> list[str | None]:
        return [version for _, version, _ in self.asked]


@pytest.fixture
def model(store: Directory, make_facts: Callable[..., Facts]) -> Model:
    model = Model(store, make_facts)
    model.open.set()
    return model


@pytest.fixture
def tasks(store: Directory, model: Model) -> Tasks:
    return Tasks(Folders(store, model.describe, settle_s=0), model.describe)


async def install(tasks: Tasks, **records: TaskRecord) -> None:
    """Prepare and install, as whoever watches the catalog does."""
    old = tasks.snapshot
    new = Snapshot(revision=old.revision + 1, tasks=records)
    changed = {
        task
        for task in old.tasks.keys() | new.tasks.keys()
        if old.tasks.get(task) != new.tasks.get(task)
    }
    await tasks.prepare(old, new, changed)
    tasks.snapshot = new


async def facts(tasks: Tasks, task: str = "mood", key: str | None = None) -> Facts:
    return await tasks.facts(tasks.choose(task, key))


async def test_a_record_wins_over_the_folder_of_its_name(
    tasks: Tasks, make_record: Record, write: Callable[..., Path]
) -> None:
    write("mood")
    write("spam")
    folder = (await facts(tasks))["version"]
    await install(tasks, mood=make_record(A))
    assert (await facts(tasks))["version"] == A != folder
    assert (await facts(tasks, "spam"))["version"] == folder  # the same content
    assert await tasks.names() == ["mood", "spam"]


async def test_a_deleted_task_is_not_found_whatever_its_folder_holds(
    tasks: Tasks, make_record: Record, write: Callable[..., Path]
) -> None:
    write("mood")
    await install(tasks, mood=make_record(A, deleted=True), other=make_record(B))
    with pytest.raises(TaskNotFound):
        tasks.choose("mood")
    assert await tasks.names() == ["other"]
    await install(tasks)
    assert (await facts(tasks))["task"] == "mood"


async def test_facts_are_asked_for_before_a_snapshot_is_installed(
    tasks: Tasks, model: Model, make_record: Record
) -> None:
    rules = {"threshold": 0.75}
    record = make_record(A, B, C, traffic={B: 0.5}, rules=rules)
    await install(tasks, mood=record)
    assert sorted(model.asked) == [("mood", A, rules), ("mood", B, rules)]  # C is in no use
    for _ in range(10):
        assert (await facts(tasks))["threshold"] == 0.75
    assert len(model.asked) == 2


async def test_a_slow_version_is_asked_for_once_though_its_snapshot_waits_no_longer(
    tasks: Tasks, model: Model, make_record: Record
) -> None:
    model.open.clear()
    old, new = Snapshot(), Snapshot(revision=1, tasks={"mood": make_record(A)})
    with pytest.raises(TimeoutError):  # as a watch does, after 2 s
        await asyncio.wait_for(tasks.prepare(old, new, ["mood"]), 0.1)
    tasks.snapshot = new
    request = asyncio.ensure_future(facts(tasks))
    await asyncio.sleep(0.05)
    model.open.set()
    assert (await request)["version"] == A
    assert model.versions == [A]  # the same flight


async def test_a_start_asks_for_nothing_and_a_request_for_its_own_version(
    tasks: Tasks, model: Model, make_record: Record
) -> None:
    many = {f"t-{n}": make_record(A, B, traffic={B: 0.5}) for n in range(1000)}
    started_s = time.monotonic()
    await install(tasks, **many)
    assert time.monotonic() - started_s < 0.5
    assert model.asked == []
    assert (await facts(tasks, "t-7"))["version"] in (A, B)
    assert len(model.asked) == 1


async def test_a_change_to_much_prepares_what_is_used_here(
    tasks: Tasks, model: Model, make_record: Record
) -> None:
    many = {f"t-{n}": make_record(A) for n in range(100)}
    await install(tasks, **many)
    await facts(tasks, "t-7")
    model.asked.clear()
    await install(tasks, **{task: make_record(B) for task in many})
    assert model.asked == [("t-7", B, {})]


async def test_a_version_that_cannot_be_prepared_holds_up_nothing(
    tasks: Tasks, model: Model, make_record: Record
) -> None:
    model.errors = {A: AdapterRefused("mood", ["no head"]), B: RuntimeError("unknown")}
    await install(tasks, mood=make_record(A, B, traffic={B: 0.5}))
    assert sorted(model.versions, key=str) == [A, B]
    assert tasks.snapshot.revision == 1


async def test_all_requests_share_one_question_which_none_of_them_ends(
    tasks: Tasks, model: Model, make_record: Record
) -> None:
    tasks.snapshot = Snapshot(revision=1, tasks={"mood": make_record(A)})
    model.open.clear()
    first, *others = [asyncio.ensure_future(facts(tasks)) for _ in range(50)]
    await asyncio.sleep(0.02)
    first.cancel()
    await asyncio.sleep(0)
    model.open.set()
    assert {one["version"] for one in await asyncio.gather(*others)} == {A}
    assert model.versions == [A]


async def test_what_failed_fails_at_once_and_is_asked_again_soon(
    tasks: Tasks, model: Model, make_record: Record
) -> None:
    refused = AdapterRefused("mood", ["no head"])
    model.errors = {A: RayTaskError("describe", "trace", refused).as_instanceof_cause()}
    await install(tasks, mood=make_record(A))
    depths = []
    for _ in range(50):
        with pytest.raises(AdapterRefused, match="no head") as caught:
            await facts(tasks)
        assert type(caught.value) is AdapterRefused
        depths.append(len(caught.traceback))
    assert len(model.asked) == 1
    assert max(depths) < 20
    model.errors = {}
    await asyncio.sleep(2.1)
    assert (await facts(tasks))["version"] == A


async def test_a_model_that_is_away_is_not_remembered(
    tasks: Tasks, model: Model, make_record: Record
) -> None:
    model.errors = {A: NotReady("no replica")}
    await install(tasks, mood=make_record(A))
    with pytest.raises(NotReady, match="no replica"):
        await facts(tasks)
    model.errors = {}
    assert (await facts(tasks))["version"] == A


async def test_other_rules_are_other_facts_and_the_old_ones_are_forgotten(
    tasks: Tasks, model: Model, make_record: Record
) -> None:
    for threshold in (0.2, 0.4, 0.6):
        await install(tasks, mood=make_record(A, rules={"threshold": threshold}))
        assert (await facts(tasks))["threshold"] == threshold
    assert len(model.asked) == 3
    await install(tasks, mood=make_record(A, rules={"threshold": 0.2}))
    assert len(model.asked) == 4


async def test_a_version_that_came_again_is_asked_for_again(
    tasks: Tasks, model: Model, make_record: Record
) -> None:
    await install(tasks, mood=make_record(A))
    later = {A: {"created_s": 2.0, "by": "me", "source": "upload"}}
    await install(tasks, mood=make_record(A, versions=later))
    assert model.versions == [A, A]


async def test_a_key_keeps_its_version_and_unkeyed_requests_are_split(
    tasks: Tasks, make_record: Record
) -> None:
    await install(tasks, mood=make_record(A, B, traffic={B: 0.5}))
    chosen = [(await facts(tasks))["version"] for _ in range(100)]
    assert chosen.count(A) == chosen.count(B) == 50
    for key in ("a", "b", "c", "d"):
        assert len({(await facts(tasks, key=key))["version"] for _ in range(20)}) == 1


async def test_out_of_contact_an_ingress_refuses_or_says_so(
    store: Directory, model: Model, make_record: Record, write: Callable[..., Path]
) -> None:
    silent_s = 0.0
    write("folder")
    folders = Folders(store, model.describe, settle_s=0)
    careful, going_on = (
        Tasks(folders, model.describe, silent_s=lambda: silent_s, refuse_when_lost=refuse)
        for refuse in (True, False)
    )
    for tasks in (careful, going_on):
        await install(tasks, mood=make_record(A))
    silent_s = 4.9
    assert careful.stale_s is None
    assert (await facts(careful))["version"] == A
    silent_s = 7.25
    for task in ("mood", "folder"):
        with pytest.raises(NotReady, match="not reached the catalog or the store for 7 s"):
            careful.choose(task)
        assert (await facts(going_on, task))["task"] == task
    assert going_on.stale_s == 7.25


@pytest.mark.parametrize(
    "error",
    [
        AdapterRefused("mood", ["no head"]), VersionNotFound("mood", A), TaskNotFound("mood"),
        AdapterIncomplete("mood", "half of it"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
async def test_the_fallback_follows_and_without_one_nothing_does(
    tasks: Tasks, make_record: Record, error: AdapterError
) -> None:
    await install(tasks, mood=make_record(A, B, fallback=B))
    first = tasks.choose("mood")
    second = tasks.instead(first, error)
    assert (second.version, second.fallback_for) == (B, A)
    unknown = isinstance(error, (VersionNotFound, TaskNotFound))
    closed = AdapterIncomplete if unknown else type(error)  # a task that is there is no 404
    with pytest.raises(closed):
        tasks.instead(second, AdapterRefused("mood", ["nor this"]))
    await install(tasks, mood=make_record(A, B))
    with pytest.raises(closed):
        tasks.instead(tasks.choose("mood"), error)


async def test_a_choice_that_is_out_of_date_is_made_again_by_what_is_true(
    tasks: Tasks, make_record: Record
) -> None:
    await install(tasks, mood=make_record(A, fallback=None), spam=make_record(A))
    mood, spam = tasks.choose("mood"), tasks.choose("spam")
    await install(tasks, mood=make_record(B), spam=make_record(A, deleted=True))
    again = tasks.instead(mood, VersionNotFound("mood", A))
    assert (again.version, again.fallback_for) == (B, None)
    with pytest.raises(TaskNotFound):
        tasks.instead(spam, VersionNotFound("spam", A))
    folder = tasks.choose("plain")
    await install(tasks, plain=make_record(C))
    assert tasks.instead(folder, VersionNotFound("plain", A)).version == C
