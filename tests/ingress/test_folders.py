import asyncio
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adapters.directory import Directory
from adapters.errors import AdapterIncomplete, AdapterRefused, StoreUnreachable, TaskNotFound
from adapters.store import Look
from deployments.errors import NotReady
from deployments.ingress.folders import Folders
from deployments.rows import Facts

SETTLE_S = 0.1
Write = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"


@dataclass
class Model:
    """Describes a folder as it is, as the model does, and counts how often it is asked."""

    store: Directory
    make_facts: Callable[..., Facts]
    asked: list[str] = field(default_factory=list)
    error: Exception | None = None
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def describe(self, task: str) -> Facts:
        self.asked.append(task)
        await self.open.wait()
        if self.error is not None:
            raise self.error
        return self.make_facts(task=task, version=self.store.read(task).version)


@pytest.fixture
def model(store: Directory, make_facts: Callable[..., Facts]) -> Model:
    model = Model(store, make_facts)
    model.open.set()
    return model


@pytest.fixture
def tasks(store: Directory, model: Model) -> Folders:
    return Folders(store, model.describe, settle_s=SETTLE_S, patience_s=1.0)


@pytest.fixture
def calm(store: Directory, model: Model) -> Folders:
    """Takes a folder for settled only after a time that no busy machine makes a copy pause."""
    return Folders(store, model.describe, settle_s=0.4, patience_s=1.0)


async def pass_by() -> None:
    """Wait until what is known is looked at again, and what was written counts as settled."""
    await asyncio.sleep(1.5 * SETTLE_S)


async def copy_slowly(folder: Path, content: bytes, seconds: float) -> None:
    """Write weights over those that are there, a piece at a time."""
    steps = max(1, round(seconds / 0.03))
    with open(folder / WEIGHTS, "wb") as file:
        for step in range(steps):
            file.write(content[len(content) * step // steps : len(content) * (step + 1) // steps])
            file.flush()
            await asyncio.sleep(0.03)


async def test_a_folder_is_described_once(write: Write, tasks: Folders, model: Model) -> None:
    write()
    first = await tasks.get("mood")
    assert first["version"] == model.store.read("mood").version
    for _ in range(3):
        await pass_by()
        assert await tasks.get("mood") == first
    assert model.asked == ["mood"]


async def test_a_known_folder_is_not_looked_at_with_every_request(
    write: Write, calm: Folders, model: Model
) -> None:
    folder = write()
    before = await calm.get("mood")
    shutil.rmtree(folder)
    assert await calm.get("mood") == before  # for settle_s at the most


async def test_a_task_without_a_folder_is_not_found(tasks: Folders, model: Model) -> None:
    for name in ("absent", "../mood", "UPPER"):
        with pytest.raises(TaskNotFound):
            await tasks.get(name)
    assert model.asked == []


async def test_a_folder_that_is_added_later_is_served(
    write: Write, tasks: Folders, model: Model
) -> None:
    with pytest.raises(TaskNotFound):
        await tasks.get("mood")
    write()
    assert (await tasks.get("mood"))["task"] == "mood"


async def test_a_folder_that_is_copied_slowly_is_waited_for(
    write: Write, calm: Folders, model: Model, weights: Callable[[int], bytes]
) -> None:
    folder = write(number=None)
    copy = asyncio.ensure_future(copy_slowly(folder, weights(1), 0.5))
    facts = await calm.get("mood")
    assert copy.done()
    assert facts["version"] == model.store.read("mood").version
    assert model.asked == ["mood"]  # not before it was whole


async def test_a_copy_that_takes_too_long_is_incomplete_and_not_remembered(
    write: Write, calm: Folders, model: Model, weights: Callable[[int], bytes]
) -> None:
    folder = write(number=None)
    copy = asyncio.ensure_future(copy_slowly(folder, weights(1), 1.5))
    started_s = time.monotonic()
    with pytest.raises(AdapterIncomplete, match="still changing"):
        await calm.get("mood")
    assert time.monotonic() - started_s >= 1.0  # the patience
    assert not copy.done()
    assert model.asked == []
    await copy
    assert (await calm.get("mood"))["version"] == model.store.read("mood").version


async def test_weights_that_come_late_are_not_remembered_as_missing(
    write: Write, tasks: Folders, model: Model
) -> None:
    write(number=None)
    for _ in range(2):
        with pytest.raises(AdapterIncomplete, match="missing"):
            await tasks.get("mood")
    assert model.asked == ["mood"] * 2
    write(number=1)
    assert (await tasks.get("mood"))["task"] == "mood"


async def test_a_refused_folder_is_remembered_until_it_changes(
    write: Write, tasks: Folders, model: Model
) -> None:
    folder = write()
    model.error = AdapterRefused("mood", ["no head", "no rank"])
    for _ in range(3):
        with pytest.raises(AdapterRefused) as caught:
            await tasks.get("mood")
        assert caught.value.problems == ("no head", "no rank")
        await pass_by()
    assert model.asked == ["mood"]
    model.error = None
    (folder / "task.json").write_text("{}")
    await pass_by()
    assert (await tasks.get("mood"))["task"] == "mood"
    assert model.asked == ["mood"] * 2


async def test_a_remembered_refusal_does_not_grow_with_every_request(
    write: Write, tasks: Folders, model: Model
) -> None:
    write()
    model.error = AdapterRefused("mood", ["no head"])
    depths = []
    for _ in range(50):
        with pytest.raises(AdapterRefused) as caught:
            await tasks.get("mood")
        depths.append(len(caught.traceback))
    assert max(depths) < 20, depths


async def test_a_new_copy_over_a_served_folder_keeps_the_old_one_until_it_is_whole(
    write: Write, calm: Folders, model: Model, weights: Callable[[int], bytes]
) -> None:
    folder = write()
    old = await calm.get("mood")
    copy = asyncio.ensure_future(copy_slowly(folder, weights(2), 0.8))
    while not copy.done():
        started_s = time.monotonic()
        assert await calm.get("mood") == old
        assert time.monotonic() - started_s < 0.6  # and nobody waits for it
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.9)
    new = await calm.get("mood")
    assert new["version"] == model.store.read("mood").version != old["version"]
    assert model.asked == ["mood"] * 2


async def test_a_copy_that_broke_off_keeps_the_old_one(
    write: Write, tasks: Folders, model: Model, weights: Callable[[int], bytes]
) -> None:
    folder = write()
    old = await tasks.get("mood")
    (folder / WEIGHTS).write_bytes(weights(2)[:-9])
    for _ in range(3):
        await pass_by()
        assert await tasks.get("mood") == old
    (folder / WEIGHTS).write_bytes(weights(2))
    await pass_by()
    await pass_by()
    assert (await tasks.get("mood"))["version"] == model.store.read("mood").version


async def test_changed_rules_are_described_again(
    write: Write, tasks: Folders, model: Model
) -> None:
    folder = write()
    await tasks.get("mood")
    (folder / "task.json").write_text('{"threshold": 0.5}')
    await pass_by()
    await pass_by()
    await tasks.get("mood")
    assert model.asked == ["mood"] * 2


async def test_other_files_change_nothing(write: Write, tasks: Folders, model: Model) -> None:
    folder = write()
    await tasks.get("mood")
    (folder / "optimizer.pt").write_text("x")
    await pass_by()
    await tasks.get("mood")
    assert model.asked == ["mood"]


async def test_a_deleted_folder_is_not_found_and_may_come_back(
    write: Write, tasks: Folders, model: Model
) -> None:
    folder = write()
    await tasks.get("mood")
    shutil.rmtree(folder)
    await pass_by()
    with pytest.raises(TaskNotFound):
        await tasks.get("mood")
    write(number=2)
    assert (await tasks.get("mood"))["version"] == model.store.read("mood").version


async def test_file_times_in_the_future_hold_nobody_up(
    write: Write, tasks: Folders, model: Model
) -> None:
    folder = write()
    os.utime(folder / WEIGHTS, (time.time() + 3600,) * 2)
    assert (await tasks.get("mood"))["task"] == "mood"
    await pass_by()
    await tasks.get("mood")
    assert model.asked == ["mood"]


async def test_all_requests_for_a_task_share_one_look_and_description(
    write: Write, tasks: Folders, model: Model
) -> None:
    write()
    model.open.clear()
    calls = [asyncio.ensure_future(tasks.get("mood")) for _ in range(50)]
    await pass_by()
    await pass_by()
    assert model.asked == ["mood"]
    model.open.set()
    answers = await asyncio.gather(*calls)
    assert all(answer == answers[0] for answer in answers)
    assert model.asked == ["mood"]


async def test_a_request_that_goes_away_does_not_end_the_shared_description(
    write: Write, tasks: Folders, model: Model
) -> None:
    write()
    model.open.clear()
    first, second = (asyncio.ensure_future(tasks.get("mood")) for _ in range(2))
    await pass_by()
    first.cancel()
    await asyncio.sleep(0)
    model.open.set()
    assert (await second)["task"] == "mood"
    assert model.asked == ["mood"]


async def test_a_slow_task_holds_up_no_other(write: Write, tasks: Folders, model: Model) -> None:
    write("slow")
    write("known")
    await tasks.get("known")
    model.open.clear()
    slow = asyncio.ensure_future(tasks.get("slow"))
    await pass_by()
    await asyncio.wait_for(tasks.get("known"), 1)
    assert not slow.done()
    model.open.set()
    await slow


@pytest.mark.parametrize("error", [NotReady("no replica"), RuntimeError("unknown")])
async def test_a_model_that_is_away_is_not_the_folder_s_fault(
    write: Write, tasks: Folders, model: Model, error: Exception
) -> None:
    write()
    model.error = error
    with pytest.raises(type(error)):
        await tasks.get("mood")
    model.error = None
    assert (await tasks.get("mood"))["task"] == "mood"


async def test_a_task_in_doubt_is_described_again(
    write: Write, tasks: Folders, model: Model
) -> None:
    write()
    await tasks.get("mood")
    tasks.doubt("mood")
    tasks.doubt("absent")
    await tasks.get("mood")
    assert model.asked == ["mood"] * 2


async def test_a_task_in_doubt_whose_folder_is_being_copied_keeps_the_old_answer(
    write: Write, tasks: Folders, model: Model
) -> None:
    write()
    old = await tasks.get("mood")
    model.error = AdapterIncomplete("mood", "its folder is still changing")
    tasks.doubt("mood")
    assert await tasks.get("mood") == old
    model.error = NotReady("no replica")
    tasks.doubt("mood")
    assert await tasks.get("mood") == old


async def test_the_names_are_those_of_the_store(write: Write, tasks: Folders) -> None:
    assert await tasks.names() == []
    write("spam")
    write("mood")
    assert await tasks.names() == ["mood", "spam"]


class Listed(Directory):
    """Counts what it is asked, and lists no faster than an object store."""

    num_listings = num_looks = 0

    def tasks(self) -> list[str]:
        self.num_listings += 1
        time.sleep(0.05)
        return super().tasks()

    def look(self, task: str, version: str | None = None) -> Look:
        self.num_looks += 1
        return super().look(task, version)


@pytest.fixture
def bucket(store: Directory) -> Listed:
    return Listed(store.root)


@pytest.fixture
def listed(bucket: Listed, model: Model) -> Folders:
    return Folders(bucket, model.describe, settle_s=SETTLE_S, list_every_s=0.4)


async def refused(folders: Folders, task: str) -> None:
    with pytest.raises(TaskNotFound):
        await folders.get(task)


async def test_unknown_tasks_cost_an_object_store_one_listing_in_a_while(
    write: Write, listed: Folders, bucket: Listed
) -> None:
    write("other")
    started_s = time.monotonic()
    for round_ in range(40):
        await asyncio.gather(*(refused(listed, f"t{round_}-{n}") for n in range(25)))
        await asyncio.sleep(0.02)
    passed_s = time.monotonic() - started_s
    assert 2 <= bucket.num_listings <= 1 + passed_s / 0.4
    assert bucket.num_looks == 0


async def test_a_folder_in_an_object_store_is_served_once_it_is_listed(
    write: Write, listed: Folders, bucket: Listed
) -> None:
    await refused(listed, "mood")
    write()
    await refused(listed, "mood")  # the listing is from before
    await asyncio.sleep(0.45)
    assert (await listed.get("mood"))["task"] == "mood"
    assert bucket.num_listings == 2
    await pass_by()
    await listed.get("mood")
    assert bucket.num_listings == 2  # what is known needs none
    assert await listed.names() == ["mood"]


async def test_a_name_that_is_listed_and_has_no_folder_is_looked_at_once_a_listing(
    listed: Folders, bucket: Listed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "tasks", lambda: ["mood"])  # as a task that has only versions is
    for _ in range(10):
        await refused(listed, "mood")
    assert bucket.num_looks == 1


async def test_an_object_store_that_is_away_is_no_missing_task(
    write: Write, listed: Folders, bucket: Listed, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("known")
    known = await listed.get("known")
    await asyncio.sleep(0.45)

    def away(*_: object) -> None:
        raise StoreUnreachable("s3://here", "timed out")

    monkeypatch.setattr(bucket, "tasks", away)
    monkeypatch.setattr(bucket, "look", away)
    with pytest.raises(StoreUnreachable):
        await listed.get("mood")
    assert await listed.get("known") == known
