"""The deployment's class without Serve: what it reads, what it keeps in RAM, what it remembers."""

import asyncio
import json
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from adapters.directory import Directory
from adapters.errors import AdapterChanged, AdapterIncomplete, AdapterRefused, TaskNotFound
from adapters.store import WEIGHTS, Files
from deployments.errors import BatchLoopDied
from deployments.model import residents
from deployments.model.deployment import Model

Make = Callable[..., PeftModel]
Start = Callable[..., Awaitable[Model]]
ROW = [([5, 6, 7], None)]


class Counting(Directory):
    """A store that counts what it reads."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[str] = []

    def read(self, task: str, version: str | None = None) -> Files:
        self.reads.append(task)
        return super().read(task, version)


@pytest.fixture
def store(served_base: str, make_adapter: Make, tmp_path: Path) -> Counting:
    for seed, task in enumerate(("mood", "spam", "topic")):
        make_adapter(tmp_path / "store" / task, served_base, num_labels=2, seed=seed)
    return Counting(tmp_path / "store")


@pytest.fixture
async def model(start_model: Start, store: Counting) -> Model:
    return await start_model(store)


async def ask(model: Model, task: str, version: str) -> list[float]:
    [scores] = await model.predict(task, version, "single_label_classification", ROW)
    assert isinstance(scores, list)
    return scores


def break_(store: Directory, task: str, **keys: Any) -> None:
    path = store.root / task / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


async def test_a_described_task_is_answered_without_another_read(
    model: Model, store: Counting
) -> None:
    version = (await model.describe("mood"))["version"]
    await ask(model, "mood", version)
    await ask(model, "mood", version)
    assert store.reads == ["mood"]


async def test_a_refused_folder_is_read_once_until_it_changes(
    model: Model, store: Counting
) -> None:
    break_(store, "mood", use_qalora=True)
    for _ in range(5):
        with pytest.raises(AdapterRefused, match="use_qalora"):
            await model.describe("mood")
    assert store.reads == ["mood"]
    break_(store, "mood", use_qalora=False)
    assert (await model.describe("mood"))["task"] == "mood"
    assert store.reads == ["mood"] * 2


async def test_a_refused_folder_is_tried_again_after_a_while(
    model: Model, store: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_(store, "mood", use_qalora=True)
    monkeypatch.setattr(model.residents.reader.failures, "_first_s", 0.05)
    for _ in range(2):
        with pytest.raises(AdapterRefused):
            await model.describe("mood")
    await asyncio.sleep(0.06)
    with pytest.raises(AdapterRefused):
        await model.describe("mood")
    assert store.reads == ["mood"] * 2


async def test_an_incomplete_folder_is_read_again_as_soon_as_it_grows(
    model: Model, store: Counting
) -> None:
    path = store.root / "mood" / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    for _ in range(3):
        with pytest.raises(AdapterIncomplete):
            await model.describe("mood")
    assert store.reads == ["mood"]
    path.write_bytes(whole)
    assert (await model.describe("mood"))["task"] == "mood"


async def test_a_version_that_is_gone_is_not_read_for_with_every_request(
    model: Model, store: Counting
) -> None:
    for _ in range(4):
        with pytest.raises(AdapterChanged):
            await ask(model, "mood", "0" * 8)
    assert store.reads == ["mood"]
    os.utime(store.root / "mood" / WEIGHTS, (time.time() + 5,) * 2)
    with pytest.raises(AdapterChanged):
        await ask(model, "mood", "0" * 8)
    assert store.reads == ["mood"] * 2


async def test_a_folder_that_comes_is_served_at_once(model: Model, store: Counting) -> None:
    for _ in range(2):
        with pytest.raises(TaskNotFound):
            await model.describe("late")
    shutil.copytree(store.root / "mood", store.root / "late")
    assert (await model.describe("late"))["task"] == "late"


async def test_what_was_prefetched_is_not_read_again(model: Model, store: Counting) -> None:
    break_(store, "topic", use_qalora=True)
    await model.prefetch(["mood", "topic", "absent", "spam"])
    assert store.reads == ["mood", "topic", "spam"]
    version = store.read("spam").version
    store.reads.clear()
    await ask(model, "spam", version)
    assert store.reads == []


async def test_a_prefetch_beside_rows_takes_its_share_of_the_time_only(
    model: Model, store: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residents, "_PREFETCH_SHARE", 0.001)  # of a load of milliseconds: seconds
    await model.describe("mood")
    model.residents.num_calls += 1  # as while a row is answered
    prefetch = asyncio.ensure_future(model.prefetch(["spam", "topic"]))
    await asyncio.sleep(0.3)
    assert store.reads == ["mood", "spam"]
    prefetch.cancel()
    model.residents.num_calls -= 1
    started_s = time.perf_counter()
    await model.prefetch(["spam", "topic"])  # and all of it where nobody waits
    assert time.perf_counter() - started_s < 1
    assert store.reads == ["mood", "spam", "spam", "topic"]


async def test_pinned_tasks_are_in_slots_at_the_start_and_stay_there(
    start_model: Start, store: Counting
) -> None:
    model = await start_model(store, adapter_slots=2, pinned_tasks=("mood",))
    version = store.read("mood").version
    assert f"mood@{version}" in model.residents.slots.resident
    for task in ("spam", "topic", "spam"):
        await ask(model, task, store.read(task).version)
    assert f"mood@{version}" in model.residents.slots.resident


async def test_a_pinned_task_that_is_refused_does_not_stop_the_start(
    start_model: Start, store: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    break_(store, "mood", use_qalora=True)
    with caplog.at_level(logging.INFO, "ray.serve"):
        model = await start_model(store, pinned_tasks=("mood", "absent", "spam"))
    assert "pinned_tasks: 1 of 3" in caplog.text
    assert "use_qalora" in caplog.text
    await ask(model, "topic", store.read("topic").version)


async def test_a_pinned_task_s_new_version_is_the_one_that_stays(
    served_base: str, start_model: Start, store: Counting, make_adapter: Make
) -> None:
    model = await start_model(store, adapter_slots=2, pinned_tasks=("mood",))
    old = store.read("mood").version
    make_adapter(store.root / "mood", served_base, num_labels=2, seed=9)
    new = store.read("mood").version
    await ask(model, "mood", new)
    for task in ("spam", "topic", "spam"):
        await ask(model, task, store.read(task).version)
    assert f"mood@{new}" in model.residents.slots.resident
    assert f"mood@{old}" not in model.residents.slots.resident


async def test_a_slot_whose_write_failed_answers_nothing_and_the_replica_is_replaced(
    model: Model, store: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask(model, "mood", (await model.describe("mood"))["version"])
    bank = model.engine.encoder.bank

    def fail(*_: Any) -> None:
        raise MemoryError("no page is free")

    monkeypatch.setattr(bank, "write", fail)
    version = (await model.describe("spam"))["version"]
    with pytest.raises(BatchLoopDied, match="holds no adapter"):
        await model.predict("spam", version, "single_label_classification", ROW)
    with pytest.raises(RuntimeError, match="device"):
        await model.check_health()
