import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

import pytest

from deployments.catalog.feed import Feed
from deployments.snapshot import Snapshot, TaskRecord, VersionRecord
from deployments.watch import Watch

VERSION = "0" * 8


def snapshot(revision: int, **revisions: int) -> Snapshot:
    one = VersionRecord(created_s=0, by="us", source="upload")
    tasks = {
        task: TaskRecord(revision=r, active=VERSION, versions={VERSION: one})
        for task, r in revisions.items()
    }
    return Snapshot(revision=revision, tasks=tasks)


class Catalog:
    """A real feed over a store that is a field, either of which can be away."""

    def __init__(self) -> None:
        self.stored = snapshot(1, one=1)
        self.feed = Feed(self.stored)
        self.away = self.store_away = self.hangs = False
        self.prepared: list[tuple[int, int, set[str]]] = []
        self.prepare_s = 0.0
        self.num_reads = 0
        self.store_goes_on = threading.Event()
        self.store_goes_on.set()

    async def write(self, new: Snapshot) -> None:
        self.stored = new
        await self.feed.publish(new)

    def read(self, revision: int) -> Snapshot | None:
        self.num_reads += 1
        self.store_goes_on.wait(30)
        if self.store_away:
            raise OSError("the store is away")
        return self.stored if self.stored.revision > revision else None

    async def poll(self, revision: int, after: str) -> dict[str, Any]:
        while self.hangs:
            await asyncio.sleep(0.01)
        if self.away:
            raise ConnectionError("the catalog is away")
        return await self.feed.page(revision, after, 0.2)

    async def prepare(self, old: Snapshot, new: Snapshot, changed: Collection[str]) -> None:
        self.prepared.append((old.revision, new.revision, set(changed)))
        await asyncio.sleep(self.prepare_s)


@pytest.fixture
def catalog() -> Catalog:
    return Catalog()


@pytest.fixture
async def watch(catalog: Catalog) -> AsyncIterator[Watch]:
    watch = Watch(
        catalog.read, catalog.poll, catalog.prepare, prepare_s=0.3, patience_s=0.5, every_s=0.05
    )
    await watch.start()
    yield watch
    watch.stop()


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not happened():
            await asyncio.sleep(0.01)


async def holds(watch: Watch, revision: int) -> None:
    await until(lambda: watch.snapshot.revision >= revision)


async def test_it_starts_from_the_store_and_follows_the_catalog(
    catalog: Catalog, watch: Watch
) -> None:
    assert watch.snapshot == catalog.stored
    await catalog.write(snapshot(2, one=1, two=2))
    await holds(watch, 2)
    assert watch.snapshot == catalog.stored
    await catalog.write(snapshot(3, two=2))
    await holds(watch, 3)
    assert watch.snapshot == catalog.stored


async def test_a_start_without_the_store_fails(catalog: Catalog) -> None:
    catalog.store_away = True
    with pytest.raises(OSError, match="away"):
        await Watch(catalog.read, catalog.poll, catalog.prepare).start()


async def test_a_snapshot_is_prepared_before_it_is_held(catalog: Catalog, watch: Watch) -> None:
    catalog.prepare_s = 0.15
    await catalog.write(snapshot(2, one=1, two=2))
    await until(lambda: (1, 2, {"two"}) in catalog.prepared)
    assert watch.snapshot.revision == 1
    await holds(watch, 2)


async def test_a_first_request_is_answered_by_what_was_written_since_the_start(
    catalog: Catalog,
) -> None:
    """Serve lists an ingress some time after it has read the store: until then nobody waits."""
    catalog.hangs = True  # so that nothing comes by a poll
    watch = Watch(catalog.read, catalog.poll, catalog.prepare)
    await watch.start()
    catalog.stored = snapshot(2, one=1, two=2)
    await asyncio.gather(*(watch.catch_up() for _ in range(8)))
    assert watch.snapshot == catalog.stored
    assert catalog.num_reads == 2, "one for the start, one for all of the first requests"
    catalog.stored = snapshot(3, one=1, two=3)
    await watch.catch_up()
    assert watch.snapshot.revision == 2, "later ones wait for nothing"
    watch.stop()


async def test_a_first_look_that_fails_is_tried_again_at_the_next_request(
    catalog: Catalog,
) -> None:
    watch = Watch(catalog.read, catalog.poll, catalog.prepare)
    await watch.start()
    catalog.store_away = True
    for _ in range(2):
        with pytest.raises(OSError, match="away"):
            await watch.catch_up()
    catalog.store_away = False
    catalog.stored = snapshot(2, two=2)
    await watch.catch_up()
    assert watch.snapshot == catalog.stored
    watch.stop()


async def test_a_preparation_that_hangs_is_not_waited_for_long(
    catalog: Catalog, watch: Watch
) -> None:
    catalog.prepare_s = 60.0
    await catalog.write(snapshot(2, two=2))
    await holds(watch, 2)


async def test_without_the_catalog_the_store_says_what_is_true(
    catalog: Catalog, watch: Watch
) -> None:
    catalog.away = True
    catalog.stored = snapshot(4, four=4)  # another cluster's, of which the feed knows nothing
    await holds(watch, 4)
    assert watch.snapshot == catalog.stored
    assert watch.stale_s == 0
    catalog.away = False
    await catalog.write(snapshot(5, four=4, five=5))
    await holds(watch, 5)
    assert watch.snapshot == catalog.stored


async def test_while_the_catalog_keeps_a_poll_waiting_the_store_is_read(
    catalog: Catalog, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.watch.POLL_S", 0.1)
    catalog.hangs = True  # as a call does whose replica is being started again
    for revision in (4, 5):
        catalog.stored = snapshot(revision, one=revision)
        await holds(watch, revision)
        assert watch.away
    catalog.hangs = False
    await until(lambda: not watch.away)
    assert watch.stale_s == 0


async def test_without_either_it_says_for_how_long(
    catalog: Catalog, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.watch.POLL_S", 0.1)
    catalog.away = catalog.store_away = True
    gone_s = time.monotonic()
    await until(lambda: watch.stale_s > 0)
    assert watch.stale_s <= time.monotonic() - gone_s + 1.0
    assert watch.snapshot.revision == 1
    catalog.store_away = False
    await until(lambda: watch.stale_s == 0)


async def test_a_store_that_hangs_keeps_no_ingress_from_the_catalog_that_is_back(
    catalog: Catalog, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.watch.POLL_S", 0.1)
    catalog.store_goes_on.clear()
    catalog.away = True
    num_reads = catalog.num_reads
    try:
        await until(lambda: watch.stale_s > 0)
        assert catalog.num_reads == num_reads + 1, "one look at a time"
        catalog.away = False
        await catalog.write(snapshot(2, one=1, two=2))
        await holds(watch, 2)
        await until(lambda: not watch.away)
        assert watch.stale_s == 0
    finally:
        catalog.store_goes_on.set()


async def test_what_a_slow_store_tells_was_true_when_it_was_asked(
    catalog: Catalog, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.watch.POLL_S", 0.1)
    catalog.store_goes_on.clear()
    catalog.hangs = True
    try:
        await until(lambda: watch.stale_s > 2)  # so that the look itself is old by now
        assert watch._looking is not None
        look = watch._looking
    finally:
        monkeypatch.setattr(watch, "_look_meanwhile", lambda: None)  # no other one follows
        catalog.store_goes_on.set()
    await asyncio.wait({look}, timeout=10)
    assert look.done()
    assert watch.stale_s > 0


async def test_an_older_revision_is_never_held(catalog: Catalog, watch: Watch) -> None:
    await catalog.write(snapshot(3, one=3))
    await holds(watch, 3)
    catalog.away, catalog.stored = True, snapshot(2, one=2)
    await asyncio.sleep(0.3)
    assert watch.snapshot == snapshot(3, one=3)
