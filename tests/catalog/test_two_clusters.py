"""Two catalogs on one store that publish, change, delete and purge: nothing is lost."""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.directory import Directory
from adapters.errors import VersionNotFound
from deployments.catalog import state, upkeep
from deployments.errors import BadInput, NotReady
from deployments.journal import Change
from deployments.snapshot import Snapshot, TaskPatch
from tests.catalog.cluster import TASKS, Cluster
from tests.catalog.s3 import S3

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    with S3().running() as one:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", one.url)
        yield one


@pytest.fixture(params=["directory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "directory":
        return str(tmp_path / "store")
    return str(request.getfixturevalue("server").bucket())


def replay(snapshot: Snapshot, change: Change) -> Snapshot:
    """Make a change as its history tells it."""
    task, what = change.task, change.what
    if "publish" in what:
        return state.add_version(
            snapshot, task, what["publish"], what["source"], change.by, 0.0,
            activate=what["activate"], if_match=None,
        )  # fmt: skip
    if "rollback" in what:
        return state.rollback(snapshot, task, None)
    if what.get("delete") == "task":
        return state.delete_task(snapshot, task, None)
    if "delete" in what:
        return state.delete_version(snapshot, task, what["delete"], None)
    gone = what.get("purging", what.get("purged"))
    if gone is not None:
        version = None if gone == "task" else gone
        if "purging" in what:
            return state.claim_purge(snapshot, task, version, "replayed", None)
        return state.purged(snapshot, task, version, "replayed")
    return state.patch(snapshot, task, TaskPatch.model_validate(what), None)


def plain(snapshot: Snapshot) -> dict[str, Any]:
    """Return a snapshot without what its history does not tell: when a version came."""
    told = snapshot.model_dump()
    for record in told["tasks"].values():
        record["purger"] = record["purger"] and "replayed"
        for version in record["versions"].values():
            version["created_s"] = 0.0
    return told


def check_serial(cluster: Cluster, acknowledged: dict[str, list[dict[str, Any]]]) -> None:
    newest = cluster.writer.refresh()
    changes = cluster.writer.journal.history(task=None, before=None, limit=10_000)[::-1]
    assert [one.revision for one in changes] == list(range(1, newest.revision + 1))
    replayed = Snapshot()
    for one in changes:
        before = replayed.tasks.get(one.task)
        assert one.was == (0 if before is None else before.revision)
        replayed = replay(replayed, one)
        assert replayed.revision == one.revision, one
    assert plain(replayed) == plain(newest)
    for name, told in acknowledged.items():
        written = {one.revision: one for one in changes if one.by == name}
        own = [one for one in told if "refused" not in one and one.get("created", True)]
        revisions = [one["revision"] for one in own]
        assert revisions == sorted(set(revisions))
        for one in own:
            change = written[one["revision"]]
            assert change.task == one["task"]
            if one["if_match"] is not None:
                assert change.was == one["if_match"], "nobody changed it in between"


@pytest.mark.parametrize("num_changes", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_two_processes_that_change_and_purge_make_one_serial_history(
    url: str, num_changes: int
) -> None:
    clusters = {
        name: subprocess.Popen(
            [sys.executable, "-m", "tests.catalog.cluster", url, name, str(num_changes)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name in ("blue", "green")
    }  # fmt: skip
    acknowledged: dict[str, list[dict[str, Any]]] = {}
    told_by = {name: process.communicate(timeout=500) for name, process in clusters.items()}
    for name, (said, failed) in told_by.items():
        assert clusters[name].returncode == 0, failed
        assert "Traceback" not in failed
        acknowledged[name] = [json.loads(line) for line in said.splitlines()]
        assert len(acknowledged[name]) == num_changes
    told = [one for some in acknowledged.values() for one in some]
    assert not [one for one in told if one.get("lost")]
    kinds = Counter(one.get("kind", one.get("refused")) for one in told)
    print(dict(kinds))
    assert {"publish", "patch", "delete"} <= kinds.keys()
    after = Cluster(url, "after")
    check_serial(after, acknowledged)
    asyncio.run(check_files(after))


async def check_files(cluster: Cluster) -> None:
    """Purge the rest; then a version has its files if, and only if, the catalog has it."""
    upkeep_s, upkeep._GRACE_S = upkeep._GRACE_S, 0.0
    cluster.upkeep._may_take_over = lambda task, purger: True  # type: ignore[method-assign]
    try:
        await cluster.upkeep._purge()
    finally:
        upkeep._GRACE_S = upkeep_s
    snapshot = await cluster.ledger.refresh()
    for task in TASKS:
        record = snapshot.tasks.get(task)
        known = set() if record is None else set(record.versions)
        assert set(cluster.store.versions(task)) == known
        for version in known:
            assert cluster.store.read(task, version).version == version
    assert cluster.store.unfinished() == []


class Slow(Directory):
    """A store whose removals wait for something."""

    before_removal: Callable[[], Awaitable[Any]] | None = None
    loop: asyncio.AbstractEventLoop

    def remove(self, task: str, version: str | None) -> None:
        if self.before_removal is not None:
            before, self.before_removal = self.before_removal, None
            asyncio.run_coroutine_threadsafe(_awaited(before), self.loop).result(30)
        super().remove(task, version)


async def _awaited(call: Callable[[], Awaitable[Any]]) -> Any:
    return await call()


@pytest.fixture
async def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Cluster, Cluster, Slow]:
    """Two clusters on one directory; the first one's removals can be made to wait."""
    monkeypatch.setattr("deployments.catalog.upkeep._GRACE_S", 0.0)
    store = Slow(tmp_path)
    store.loop = asyncio.get_running_loop()
    return Cluster(str(tmp_path), "blue", store), Cluster(str(tmp_path), "green"), store


async def test_a_slow_purge_removes_nothing_that_the_other_cluster_made_anew(
    pair: tuple[Cluster, Cluster, Slow],
) -> None:
    blue, green, store = pair
    await blue.publish("mood", 1)
    version = (await blue.publish("mood", 2))["version"]
    await blue.delete("mood", version)
    tried = []

    async def meanwhile() -> None:
        await green.upkeep._purge()
        with pytest.raises(NotReady, match="being deleted"):
            await green.publish("mood", 2)
        tried.append(True)

    store.before_removal = meanwhile
    await blue.upkeep._purge()
    assert tried
    assert version not in green.store.versions("mood")
    await green.ledger.refresh()
    assert (await green.publish("mood", 2))["created"]
    await blue.upkeep._purge()
    assert not await green.lost("mood", version)


async def test_who_was_to_purge_and_died_is_followed_by_another_and_does_not_come_back(
    pair: tuple[Cluster, Cluster, Slow], monkeypatch: pytest.MonkeyPatch
) -> None:
    blue, green, _ = pair
    monkeypatch.setattr("deployments.catalog.upkeep._PURGE_S", 0.05)
    await blue.publish("mood", 1)
    version = (await blue.publish("mood", 2))["version"]
    await blue.delete("mood", version)

    async def meanwhile() -> None:  # for longer than it may take
        async with asyncio.timeout(10):
            while version in (await green.ledger.refresh()).tasks["mood"].doomed:
                await green.upkeep._purge()
                await asyncio.sleep(0.01)

    # Before the look at the time, where the process is stopped.
    remove_folder = blue.upkeep._remove_folder

    async def stopped(task: str, version: str | None, until_s: float) -> None:
        await meanwhile()
        await green.publish(task, 2)
        await remove_folder(task, version, until_s)

    monkeypatch.setattr(blue.upkeep, "_remove_folder", stopped)
    await blue.upkeep._purge()
    assert not await green.lost("mood", version)
    assert version in (await green.ledger.refresh()).tasks["mood"].versions


@pytest.mark.parametrize("when", ["before the removal", "after it"])
async def test_a_refused_upload_takes_none_away_that_the_other_cluster_has_acknowledged(
    pair: tuple[Cluster, Cluster, Slow], when: str
) -> None:
    """Both make the same folder, of which one is refused and takes back what it made."""
    blue, green, store = pair
    first = (await blue.publish("mood", 1))["version"]
    blue.replicas.error = BadInput("it misses its golden answers")

    async def published() -> None:
        told = await green.publish("mood", 2, activate=True)
        assert told["created"]

    if when == "before the removal":
        store.before_removal = published
        with pytest.raises(BadInput, match="golden"):
            await blue.publish("mood", 2, activate=True)
    else:

        async def refused() -> None:
            with pytest.raises(BadInput, match="golden"):
                await blue.publish("mood", 2, activate=True)

        # Green has found its folder there, and has not written its revision yet.
        green.replicas.meanwhile = refused
        await published()
    record = (await green.ledger.refresh()).tasks["mood"]
    assert len(record.versions) == 2
    assert record.active != first
    assert not await green.lost("mood", record.active)
    assert green.store.unfinished() == []


async def test_a_refused_upload_leaves_nothing_where_nobody_else_wants_it(
    pair: tuple[Cluster, Cluster, Slow],
) -> None:
    blue, green, _ = pair
    first = (await blue.publish("mood", 1))["version"]
    blue.replicas.error = BadInput("it misses its golden answers")
    with pytest.raises(BadInput):
        await blue.publish("mood", 2, activate=True)
    assert blue.store.versions("mood") == [first]
    with pytest.raises(VersionNotFound):
        green.store.read("mood", "0" * 8)
