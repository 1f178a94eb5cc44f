import asyncio
import time
from typing import Any

import pytest

from deployments.catalog.feed import Feed
from deployments.snapshot import Snapshot, TaskRecord, VersionRecord

VERSION = "0" * 8


def record(revision: int, by: str = "us") -> TaskRecord:
    versions = {VERSION: VersionRecord(created_s=0, by=by, source="upload")}
    return TaskRecord(revision=revision, active=VERSION, versions=versions)


def snapshot(revision: int, **revisions: int) -> Snapshot:
    return Snapshot(revision=revision, tasks={t: record(r) for t, r in revisions.items()})


async def test_a_watcher_is_told_just_what_changed_since_its_revision() -> None:
    feed = Feed(snapshot(5, old=2, new=5))
    page = await feed.page(5, "", 0.0)
    assert page == {"revision": 5, "tasks": {}, "reset": False, "next": None}
    await feed.publish(snapshot(7, old=2, new=6, newer=7))
    page = await feed.page(6, "", 0.0)
    assert page["revision"] == 7
    assert list(page["tasks"]) == ["newer"]
    assert TaskRecord.model_validate(page["tasks"]["newer"]) == record(7)


async def test_a_task_that_is_gone_is_told_of_by_name_to_those_who_may_have_it() -> None:
    feed = Feed(snapshot(5, going=3, staying=4))
    await feed.publish(snapshot(6, staying=4))
    assert (await feed.page(5, "", 0.0))["tasks"] == {"going": None}
    assert (await feed.page(6, "", 0.0))["tasks"] == {}
    await feed.publish(snapshot(7, staying=4, going=7))
    told = (await feed.page(5, "", 0.0))["tasks"]
    assert told["going"]["revision"] == 7


async def test_who_holds_less_than_the_feed_remembers_is_told_everything() -> None:
    feed = Feed(snapshot(5, one=2, two=5))
    page = await feed.page(3, "", 0.0)
    assert page["reset"] is True
    assert set(page["tasks"]) == {"one", "two"}


async def test_pages_hold_at_most_a_mebibyte_and_together_all_of_it() -> None:
    long = "x" * 100_000
    tasks = {f"task-{i:02}": record(1, by=long) for i in range(35)}
    feed = Feed(Snapshot(revision=1, tasks=tasks))
    told: dict[str, Any] = {}
    after, num_pages = "", 0
    while True:
        page = await feed.page(0, after, 0.0)
        size = sum(len(str(one)) for one in page["tasks"].values())
        assert size < 2**20 + 200_000
        assert not told.keys() & page["tasks"].keys()
        told |= page["tasks"]
        num_pages += 1
        if page["next"] is None:
            break
        after = page["next"]
    assert num_pages == 4
    assert told.keys() == tasks.keys()


async def test_a_poll_waits_for_news_and_no_longer_than_it_may() -> None:
    feed = Feed(snapshot(1, one=1))
    started_s = time.monotonic()
    waiting = asyncio.ensure_future(feed.page(1, "", 30.0))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await feed.publish(snapshot(2, one=2))
    assert (await waiting)["revision"] == 2
    assert time.monotonic() - started_s < 5
    started_s = time.monotonic()
    assert (await feed.page(2, "", 0.1))["tasks"] == {}
    assert 0.1 <= time.monotonic() - started_s < 5


async def test_closing_ends_all_polls() -> None:
    feed = Feed(snapshot(1, one=1))
    waiting = [asyncio.ensure_future(feed.page(1, "", 30.0)) for _ in range(3)]
    await asyncio.sleep(0.01)
    await feed.close()
    async with asyncio.timeout(5):
        for page in await asyncio.gather(*waiting):
            assert page["tasks"] == {}


@pytest.mark.parametrize("revision", [4, 5])
async def test_what_is_not_newer_is_not_published(revision: int) -> None:
    feed = Feed(snapshot(5, one=5))
    await feed.publish(snapshot(revision))
    assert (await feed.page(0, "", 0.0))["tasks"].keys() == {"one"}
