"""A replica follows the catalog: what it keeps in slots, and what it forgets for good."""

import asyncio
import gc
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.bucket import Bucket
from adapters.directory import Directory
from adapters.disk import Disk
from adapters.errors import AdapterError, VersionNotFound
from adapters.store import WEIGHTS, Files
from deployments.model.deployment import Model
from deployments.snapshot import Snapshot, TaskRecord, VersionRecord

Start = Callable[..., Awaitable[Model]]
Publish = Callable[..., str]
ROW = [([5, 6, 7], None)]
KIND = "single_label_classification"


@pytest.fixture
def store(tmp_path: Path) -> Directory:
    (tmp_path / "store").mkdir()
    return Directory(tmp_path / "store")


@pytest.fixture
def publish(publish_to: Callable[..., str], store: Directory) -> Publish:
    return partial(publish_to, store)


def record(*versions: str, **given: Any) -> TaskRecord:
    made = VersionRecord(created_s=0, by="test", source="upload")
    return TaskRecord(
        **{"revision": 1, "active": versions[0], "versions": dict.fromkeys(versions, made), **given}
    )


class Catalog:
    """Tells a model one snapshot after the other, as its watch does."""

    def __init__(self, model: Model) -> None:
        self.model, self.snapshot = model, Snapshot()

    async def change(self, task: str, new: TaskRecord | None) -> None:
        tasks = {name: of for name, of in self.snapshot.tasks.items() if name != task}
        tasks |= {task: new} if new is not None else {}
        old, self.snapshot = (
            self.snapshot,
            Snapshot(revision=self.snapshot.revision + 1, tasks=tasks),
        )
        await self.model.residents.follow(old, self.snapshot)


async def ask(model: Model, task: str, version: str) -> list[float]:
    [scores] = await model.predict(task, version, KIND, ROW)
    assert isinstance(scores, list)
    return scores


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.01)


def resident(model: Model) -> set[str]:
    return {*model.residents.slots.resident}


async def bank_free(model: Model) -> int:
    """Pages that are free in the bank itself, once the device has done all before."""
    await model._on_device(int)
    return model.engine.encoder.bank._free.num_free


async def test_what_is_pinned_stays_in_slots_and_leaves_when_it_is_not(
    start_model: Start, store: Directory, publish: Publish
) -> None:
    model = await start_model(store, adapter_slots=3)
    catalog = Catalog(model)
    first, second = publish("mood", 1), publish("mood", 2)
    others = [(task, publish(task, 3)) for task in ("spam", "topic")]
    await catalog.change("mood", record(first, second, pinned=True, traffic={second: 0.5}))
    both = {f"mood@{first}", f"mood@{second}"}
    await until(lambda: resident(model) == both)
    for other in others * 2:
        await ask(model, *other)
        assert both < resident(model)
    await catalog.change("mood", record(second, first, pinned=True))  # without traffic for first
    for other in others:
        await ask(model, *other)
    assert f"mood@{second}" in resident(model)
    assert f"mood@{first}" not in resident(model)
    await catalog.change("mood", record(second, first))
    for other in [*others, ("mood", first)]:
        await ask(model, *other)
    assert f"mood@{second}" not in resident(model)


async def test_a_task_that_the_config_pins_is_pinned_as_the_catalog_has_it(
    start_model: Start, store: Directory, publish: Publish
) -> None:
    first, second = publish("mood", 1), publish("mood", 2)
    model = await start_model(store, adapter_slots=2, pinned_tasks=("mood",))
    catalog = Catalog(model)
    await catalog.change("mood", record(first, second))
    await until(lambda: resident(model) == {f"mood@{first}"})
    await catalog.change("mood", record(second, first))
    await until(lambda: f"mood@{second}" in resident(model))
    await ask(model, "mood", first)  # a request that is late pins nothing
    await ask(model, "spam", publish("spam", 3))
    assert resident(model) == {f"mood@{second}", *resident(model)} - {f"mood@{first}"}


async def test_all_that_is_pinned_is_there_before_traffic_comes(
    start_model: Start, store: Directory, publish: Publish
) -> None:
    version = publish("mood")
    model = await start_model(store)
    await Catalog(model).change("mood", record(version, pinned=True))
    await model.residents.load_pinned()
    assert resident(model) == {f"mood@{version}"}


async def test_a_deleted_version_leaves_slot_ram_and_disk(
    start_model: Start, publish_to: Publish, tmp_path: Path
) -> None:
    store = Bucket(f"memory://{tmp_path.name}", Disk(tmp_path / "cache", "memory://", 2**30))
    old, new = (publish_to(store, "mood", seed) for seed in (1, 2))
    model = await start_model(store, adapter_store=str(tmp_path))
    catalog, residents, free = Catalog(model), model.residents, await bank_free(model)
    await catalog.change("mood", record(new, old))
    await ask(model, "mood", new)
    alone_free, alone_bytes = await bank_free(model), residents.host.used_bytes
    await ask(model, "mood", old)
    pages = ref(residents.host._items[f"mood@{old}"].loaded.packed.pages)
    assert await bank_free(model) == residents.slots.pages_free < alone_free < free
    assert store.on_disk() == {("mood", old), ("mood", new)}

    await catalog.change("mood", record(new, old, doomed=(old,)))
    assert resident(model) == {f"mood@{new}"}
    assert await bank_free(model) == residents.slots.pages_free == alone_free
    assert residents.host.used_bytes == alone_bytes
    assert store.on_disk() == {("mood", new)}
    gc.collect()
    assert pages() is None
    store.remove("mood", old)
    await catalog.change("mood", record(new))
    with pytest.raises(VersionNotFound):
        await ask(model, "mood", old)

    await catalog.change("mood", record(new, deleted=True))
    assert await bank_free(model) == residents.slots.pages_free == free
    assert residents.host.used_bytes == 0
    assert store.on_disk() == set()


async def test_of_two_replicas_one_with_a_corrupted_disk_cache_fetches_anew(
    start_model: Start, publish_to: Publish, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"memory://{tmp_path.name}-two"
    caches = [tmp_path / "one", tmp_path / "two"]
    stores = [Bucket(url, Disk(cache, "memory://", 2**30)) for cache in caches]
    version = publish_to(stores[0], "mood")
    replicas = [await start_model(store, adapter_store=str(tmp_path)) for store in stores]
    wanted = [await ask(replica, "mood", version) for replica in replicas]
    assert wanted[0] == wanted[1]
    for replica in replicas:
        replica.residents._drop("mood", version)  # from slot and RAM; the disk keeps it
    (weights,) = caches[1].rglob("adapter_model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 0xFF
    weights.write_bytes(content)
    caplog.clear()
    assert [await ask(replica, "mood", version) for replica in replicas] == wanted
    (told,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert version in told
    assert stores[1].on_disk() == {("mood", version)}


async def test_ram_is_given_back_to_the_system(
    start_model: Start, store: Directory, served_base: str, make_adapter: Callable[..., Any]
) -> None:
    make_adapter(store.root / "mood", served_base, num_labels=2)
    file, labels = store.root / "mood" / WEIGHTS, 300_000  # 40 MB, which malloc never keeps
    large = {"weight": torch.zeros(labels, 32), "bias": torch.zeros(labels)}
    head = {f"base_model.model.classifier.{leaf}": tensor for leaf, tensor in large.items()}
    save_file(load_file(file) | head, file)
    version = store.read("mood").version
    model = await start_model(store)
    catalog = Catalog(model)
    await catalog.change("mood", record(version))
    await model.describe("mood", version)
    gc.collect()
    held_rss_bytes = rss_bytes()
    held_bytes = model.residents.host.used_bytes
    assert held_bytes > 38e6
    await catalog.change("mood", record(version, deleted=True))
    gc.collect()
    # What allocators keep of a load for the next one comes and goes before.
    assert held_rss_bytes - rss_bytes() > 0.9 * held_bytes


def rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def test_a_row_that_is_being_answered_is_answered_before_its_slot_is_free(
    start_model: Start, store: Directory, publish: Publish
) -> None:
    version = publish("mood")
    model = await start_model(store)
    catalog, free = Catalog(model), await bank_free(model)
    await catalog.change("mood", record(version))
    expected = await ask(model, "mood", version)
    # The device is busy while the version is deleted under a row.
    busy = threading.Event()
    waiting = asyncio.ensure_future(model._on_device(busy.wait, 5))
    row = asyncio.ensure_future(ask(model, "mood", version))
    await asyncio.sleep(0.05)
    await catalog.change("mood", record(version, deleted=True))
    store.remove("mood", version)
    await catalog.change("mood", None)
    assert resident(model) == set()
    assert model.residents.slots.pages_free < free
    assert not row.done()
    busy.set()
    assert await row == expected
    await waiting
    assert await bank_free(model) == model.residents.slots.pages_free == free


async def test_a_late_request_is_answered_while_there_are_files_and_nothing_of_it_stays(
    start_model: Start, store: Directory, publish: Publish
) -> None:
    old, new = publish("mood", 1), publish("mood", 2)
    model = await start_model(store)
    catalog, residents, free = Catalog(model), model.residents, await bank_free(model)
    await catalog.change("mood", record(new, old))
    expected = await ask(model, "mood", old)
    await catalog.change("mood", record(new, old, doomed=(old,)))
    late = await asyncio.gather(*(ask(model, "mood", old) for _ in range(5)))
    assert late == [pytest.approx(expected)] * 5
    await model.describe("mood", old)
    await model.warm("mood", old)
    assert resident(model) == set(residents.host.versions) == set()
    assert await bank_free(model) == residents.slots.pages_free == free


async def test_a_version_that_is_published_again_is_served_again(
    start_model: Start, store: Directory, publish: Publish
) -> None:
    version = publish("mood")
    model = await start_model(store)
    catalog = Catalog(model)
    await catalog.change("mood", record(version))
    expected = await ask(model, "mood", version)
    await catalog.change("mood", record(version, deleted=True))
    store.remove("mood", version)
    with pytest.raises(AdapterError):
        await ask(model, "mood", version)
    await catalog.change("mood", None)
    assert publish("mood") == version
    await catalog.change("mood", record(version, pinned=True))
    await until(lambda: resident(model) == {f"mood@{version}"})
    assert await ask(model, "mood", version) == pytest.approx(expected)
    assert resident(model) == {f"mood@{version}"}


class Slow(Directory):
    """A store of which one task is read only when told."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go = threading.Event()

    def read(self, task: str, version: str | None = None) -> Files:
        if task.startswith("slow"):
            self.go.wait(10)
        return super().read(task, version)


async def test_a_slow_load_holds_up_no_forgetting(
    start_model: Start, store: Directory, publish: Publish
) -> None:
    slow = {task: publish(task, 1) for task in ("slow-a", "slow-b", "slow-c")}
    version = publish("mood", 2)
    slowly = Slow(store.root)
    model = await start_model(slowly)
    catalog = Catalog(model)
    await catalog.change("mood", record(version))
    await ask(model, "mood", version)
    started_s = time.perf_counter()
    for task, pinned in slow.items():  # more than are read at a time
        await catalog.change(task, record(pinned, pinned=True))
    await catalog.change("mood", record(version, deleted=True))
    assert time.perf_counter() - started_s < 1
    assert resident(model) == set(model.residents.host.versions) == set()
    await catalog.change("slow-b", record(slow["slow-b"], deleted=True))  # while it loads
    slowly.go.set()
    kept = {f"slow-a@{slow['slow-a']}", f"slow-c@{slow['slow-c']}"}
    await until(lambda: resident(model) == kept)
    await asyncio.sleep(0.1)
    assert resident(model) == set(model.residents.host.versions) == kept


async def test_what_cannot_be_pinned_is_told_and_stops_nothing(
    start_model: Start, store: Directory, publish: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    version = publish("spam")
    model = await start_model(store)
    with caplog.at_level(logging.WARNING, "ray.serve"):
        await Catalog(model).change("mood", record("0" * 8, pinned=True))
        await Catalog(model).change("spam", record(version, pinned=True))
        await until(lambda: resident(model) == {f"spam@{version}"} and "mood is not" in caplog.text)


async def test_a_failure_of_a_deleted_version_is_forgotten(
    start_model: Start, store: Directory, publish: Publish
) -> None:
    version = publish("mood")
    (store.root / "mood" / version / "adapter_config.json").write_text("{}")
    model = await start_model(store)
    catalog = Catalog(model)
    await catalog.change("mood", record(version))
    with pytest.raises(AdapterError):
        await ask(model, "mood", version)
    assert [of["where"] for of in (await model.residency("", 9))["versions"]] == ["failed"]
    await catalog.change("mood", record(version, deleted=True))
    assert (await model.residency("", 9))["versions"] == []
