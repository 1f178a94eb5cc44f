"""Changes over a real store and a real journal; the replicas are one that computes nothing."""

import asyncio
import gc
import io
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.directory import Directory
from adapters.documents import open_documents
from adapters.errors import (
    AdapterIncomplete,
    AdapterRefused,
    BankFull,
    StoreUnreachable,
    TaskNotFound,
    VersionNotFound,
)
from adapters.store import CONFIG, WEIGHTS, digest
from deployments.catalog import state
from deployments.catalog.adoption import Adoption
from deployments.catalog.changes import Changes
from deployments.catalog.ledger import Ledger
from deployments.catalog.upkeep import Upkeep
from deployments.catalog.usage import UsageSums
from deployments.catalog.writer import Writer
from deployments.errors import BadInput, Conflict, NotReady, Stale, Unsure
from deployments.snapshot import Snapshot, TaskPatch, TaskRecord


class Replicas:
    """What the catalog asks of others, written down; a version is bad if its config says so."""

    def __init__(self, store: Directory) -> None:
        self.store = store
        self.asked: list[tuple[Any, ...]] = []
        self.problems: list[str] = []
        self.away = False
        self.waiting_for: list[str] = []
        self.room = 99
        self.faults: dict[str, Exception] = {}  # what is asked -> raised
        self.meanwhile: Callable[[], Any] | None = None

    async def check(self, task: str, staging: str | None, rules: dict[str, Any]) -> Any:
        self.asked.append(("check", task, staging is None))
        self._fail("check")
        if self.away:
            raise NotReady("no model replica is running")
        read = self.store.read if staging is None else self.store.read_staged
        files = read(task) if staging is None else read(staging, task)
        if b"bad" in files.contents[CONFIG]:
            raise AdapterRefused(task, ["its config is bad", "its weights are worse"])
        return {"version": files.version}

    async def describe(self, task: str, version: str, rules: dict[str, Any]) -> Any:
        self.asked.append(("describe", task, version, rules))
        self._fail("describe")
        if rules.get("labels") == ["wrong"]:
            raise AdapterRefused(task, ["1 label is named, the head has 2"])
        return {"version": self.store.read(task, version).version}

    async def warm(self, task: str, *versions: str) -> None:
        self.asked.append(("warm", task, *versions))
        self._fail("warm")
        if len(versions) > self.room:
            raise BankFull(f"{task}@{versions[-1]}", self.room)
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            await meanwhile()

    async def forget(self, task: str, version: str) -> None:
        self.asked.append(("forget", task, version))

    async def golden(self, task: str, version: str, rules: dict[str, Any]) -> list[str]:
        self.asked.append(("golden", task, version))
        self._fail("golden")
        return self.problems

    def _fail(self, what: str) -> None:
        if what in self.faults:
            raise self.faults[what]

    async def reach(self, revision: int) -> list[str]:
        self.asked.append(("reach", revision))
        return self.waiting_for


class World:
    """A catalog without Ray over a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Directory(root)
        self.writer = Writer(open_documents(str(root)))
        self.writer.refresh()
        self.usage = UsageSums()
        self.ledger = Ledger(self.writer, self.usage)
        self.replicas = Replicas(self.store)
        self.adoption = Adoption(self.ledger, self.store, self.replicas)
        self.changes = Changes(self.ledger, self.store, self.replicas, self.adoption)
        self.upkeep = Upkeep(
            self.ledger, self.usage, self.store, self.replicas, self.adoption, scan_every_s=0.75
        )

    def stage(self, number: int, config: str = "{}") -> str:
        return self.store.stage(
            {CONFIG: io.BytesIO(config.encode()), WEIGHTS: io.BytesIO(content(number))}
        )

    async def publish(self, number: int, **given: Any) -> dict[str, Any]:
        options = {"source": "upload", "by": "us", "activate": False, "if_match": None, **given}
        config = options.pop("config", "{}")
        return await self.changes.publish("mood", self.stage(number, config), **options)

    async def patch(self, if_match: int | None = None, **patch: Any) -> dict[str, Any]:
        return await self.changes.patch(
            "mood", TaskPatch.model_validate(patch), by="us", if_match=if_match
        )

    @property
    def record(self) -> TaskRecord:
        """As a catalog that starts now finds it."""
        return Writer(open_documents(str(self.root))).refresh().tasks["mood"]

    def files(self) -> list[str]:
        """All that lies in the store but for the catalog's own."""
        paths = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
        return sorted(str(path) for path in paths if path.parts[0] != "catalog")

    def drop(self, task: str, number: int, version: str = "") -> Path:
        folder = self.root / task / version
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text("{}")
        (folder / WEIGHTS).write_bytes(content(number))
        return folder


def content(number: int) -> bytes:
    """An empty safetensors file; another number makes another version."""
    header = b'{"__metadata__":{"n":"%d"}}' % number
    return len(header).to_bytes(8, "little") + header


def unreachable(*_: object) -> Any:
    raise StoreUnreachable("the store", "it is away")


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path / "store")


async def test_the_first_version_is_warmed_tried_written_and_told(world: World) -> None:
    told = await world.publish(1)
    version = told["version"]
    assert told == {
        "task": "mood", "version": version, "revision": 1, "etag": 1,
        "everywhere": True, "created": True,
    }  # fmt: skip
    assert world.record.active == version
    assert world.files() == [f"mood/{version}/{CONFIG}", f"mood/{version}/{WEIGHTS}"]
    assert world.replicas.asked == [
        ("check", "mood", False),
        ("describe", "mood", version, {}),
        ("warm", "mood", version),
        ("golden", "mood", version),
        ("reach", 1),
    ]


async def test_a_later_version_waits_until_it_is_told(world: World) -> None:
    first = (await world.publish(1))["version"]
    second = (await world.publish(2))["version"]
    assert world.record.active == first
    assert ("warm", "mood", second) not in world.replicas.asked
    await world.patch(active=second)
    assert world.record.active == second
    assert world.replicas.asked[-3:] == [
        ("warm", "mood", second), ("golden", "mood", second), ("reach", 3),
    ]  # fmt: skip


async def test_the_same_content_is_the_same_version(world: World) -> None:
    first = await world.publish(1)
    again = await world.publish(1)
    assert (again["version"], again["created"]) == (first["version"], False)
    assert len(world.files()) == 2
    assert world.record.revision == 1


async def test_the_same_weights_with_other_rules_are_no_new_version_and_not_dropped_silently(
    world: World,
) -> None:
    await world.publish(1)
    files = {CONFIG: b"{}", WEIGHTS: content(1), "task.json": b'{"labels": ["a", "b"]}'}
    staging = world.store.stage({name: io.BytesIO(file) for name, file in files.items()})
    with pytest.raises(Conflict, match=r"another task\.json; change rules by PATCH"):
        await world.changes.publish(
            "mood", staging, source="upload", by="us", activate=False, if_match=None
        )
    assert len(world.files()) == 2


async def test_what_a_dead_publication_left_gives_way_to_the_next(world: World) -> None:
    left = world.stage(1)
    version = world.store.read_staged(left, "mood").version
    world.store.publish(left, "mood", version)  # and the process dies here
    world.store.discard(left)
    files = {CONFIG: b"{}", WEIGHTS: content(1), "task.json": b'{"labels": ["a", "b"]}'}
    staging = world.store.stage({name: io.BytesIO(file) for name, file in files.items()})
    told = await world.changes.publish(
        "mood", staging, source="upload", by="us", activate=False, if_match=None
    )
    assert (told["version"], told["created"]) == (version, True)
    assert world.store.read("mood", version).contents["task.json"] == files["task.json"]


@pytest.mark.parametrize(
    "wrong", ["check", "golden", "stale", "check breaks", "describe breaks", "warm breaks"]
)
async def test_what_is_refused_leaves_nothing(world: World, wrong: str) -> None:
    if wrong == "check":
        with pytest.raises(BadInput, match=r"config is bad.*weights are worse"):
            await world.publish(1, config='{"bad": 1}')
    elif wrong == "golden":
        world.replicas.problems = ["line 3 misses by 0.5"]
        with pytest.raises(BadInput, match="line 3 misses"):
            await world.publish(1)
    elif wrong == "stale":
        with pytest.raises(Stale):
            await world.publish(1, if_match=7)
    else:
        what = wrong.partition(" ")[0]
        world.replicas.faults[what] = RuntimeError("it is broken")
        with pytest.raises(RuntimeError, match="it is broken"):
            await world.publish(1)
        world.replicas.faults.clear()
    assert world.files() == []
    await world.adoption.scan()
    asked = world.replicas.asked
    assert [one[0] for one in asked if one[0] in ("warm", "forget")][-1:] != ["warm"]
    with pytest.raises(KeyError):
        _ = world.record


async def test_what_cannot_be_taken_back_now_is_seen_by_nobody_and_taken_back_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.drop("mood", 1)
    before = world.files()
    world.replicas.problems = ["line 3 misses by 0.5"]
    with monkeypatch.context() as away:
        away.setattr(world.store, "remove", unreachable)
        with pytest.raises(Unsure, match=r"line 3 misses.*are removed later"):
            await world.publish(2, activate=True)
    world.replicas.problems = []
    await world.adoption.scan()
    assert world.ledger.snapshot.tasks == {}
    monkeypatch.setattr("deployments.catalog.upkeep._DEAD_S", -1.0)
    await world.upkeep._clear_unfinished()
    assert world.files() == before


async def test_a_change_that_is_written_is_answered_when_its_staging_cannot_be_removed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as away:
        away.setattr(world.store, "discard", unreachable)
        told = await world.publish(1)
    assert told["created"]
    assert world.record.active == told["version"]
    assert world.store.unfinished() != []
    monkeypatch.setattr("deployments.catalog.upkeep._DEAD_S", -1.0)
    await world.upkeep._clear_unfinished()
    assert world.files() == [f"mood/{told['version']}/{name}" for name in (CONFIG, WEIGHTS)]


async def test_a_version_that_is_written_and_lost_its_files_is_unsure_and_gets_them_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other cluster removes the folder, and the store is away when that is found out."""
    commit, publish = world.ledger.commit, world.store.publish

    async def lost(*args: Any, **kwargs: Any) -> Snapshot:
        written = await commit(*args, **kwargs)
        world.store.remove("mood", world.ledger.snapshot.tasks["mood"].active)
        monkeypatch.setattr(world.store, "publish", unreachable)
        return written

    monkeypatch.setattr(world.ledger, "commit", lost)
    with pytest.raises(Unsure, match="is written, but its files may be missing"):
        await world.publish(1)
    monkeypatch.setattr(world.store, "publish", publish)
    monkeypatch.setattr("deployments.catalog.upkeep._DEAD_S", -1.0)
    await world.upkeep._clear_unfinished()
    version = world.record.active
    assert world.store.read("mood", version).version == version
    assert world.store.unfinished() == []


async def test_a_deletion_that_is_written_is_answered_when_the_folder_cannot_be_removed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.catalog.upkeep._GRACE_S", 0.0)
    world.drop("mood", 1)
    with monkeypatch.context() as away:
        away.setattr(world.store, "remove", unreachable)
        told = await world.changes.delete("mood", None, by="us", if_match=None)
    assert told["everywhere"]
    assert world.record.deleted
    await world.upkeep._purge()
    assert world.files() == []


async def test_a_refused_upload_leaves_a_folder_that_a_person_put_there(world: World) -> None:
    await world.publish(1)
    version = digest({CONFIG: b"{}", WEIGHTS: content(2)})
    world.drop("mood", 2, version)
    before = world.files()
    world.replicas.problems = ["line 3 misses"]
    with pytest.raises(BadInput):
        await world.publish(2, activate=True)
    assert world.files() == before
    world.replicas.problems = []
    told = await world.publish(2)
    assert (told["version"], told["created"]) == (version, True)


async def test_rules_are_checked_against_all_versions_in_use(world: World) -> None:
    first = (await world.publish(1))["version"]
    second = (await world.publish(2))["version"]
    await world.patch(traffic={second: 0.5})
    world.replicas.asked.clear()
    await world.patch(rules={"threshold": 0.5})
    asked = {one[2] for one in world.replicas.asked if one[0] == "describe"}
    assert asked == {first, second}
    with pytest.raises(BadInput, match="the head has 2"):
        await world.patch(rules={"labels": ["wrong"]})
    assert world.record.rules == {"threshold": 0.5}


async def test_a_change_that_was_overtaken_is_made_ready_anew(world: World) -> None:
    first = (await world.publish(1))["version"]
    second = (await world.publish(2))["version"]
    world.replicas.meanwhile = lambda: World(world.root).patch(rules={"threshold": 0.5})
    await world.patch(active=second)
    described = [one for one in world.replicas.asked if one[:3] == ("describe", "mood", second)]
    assert [one[3] for one in described] == [{}, {"threshold": 0.5}]
    assert world.record.active == second
    world.replicas.meanwhile = lambda: World(world.root).patch(rules={"threshold": 0.7})
    with pytest.raises(Stale):
        await world.patch(if_match=world.record.revision, active=first)
    assert world.record.active == second


async def test_an_upload_that_was_overtaken_finds_what_it_published(world: World) -> None:
    await world.publish(1)
    world.replicas.meanwhile = lambda: World(world.root).patch(rules={"threshold": 0.5})
    told = await world.publish(2, activate=True)
    assert told["created"]
    assert world.record.active == told["version"]
    assert len(world.files()) == 4


async def test_a_canary_is_warmed_anew_before_it_is_active(world: World) -> None:
    await world.publish(1)
    second = (await world.publish(2))["version"]
    await world.patch(traffic={second: 0.5})
    world.replicas.asked.clear()
    await world.patch(active=second)
    assert ("warm", "mood", second) in world.replicas.asked


async def test_what_is_pinned_has_room_in_slots_before(world: World) -> None:
    first = (await world.publish(1))["version"]
    second = (await world.publish(2))["version"]
    await world.patch(traffic={second: 0.5})
    before = world.record
    world.replicas.asked.clear()
    world.replicas.room = 1
    with pytest.raises(BankFull, match=f"no room for mood@{second} beside"):
        await world.patch(pinned=True)
    assert world.record == before
    world.replicas.room = 2
    await world.patch(pinned=True)
    assert world.replicas.asked.count(("warm", "mood", first, second)) == 2
    world.replicas.asked.clear()
    await world.patch(traffic={})
    await world.patch(pinned=False)
    assert [one for one in world.replicas.asked if one[0] == "warm"] == []


async def test_a_rollback_asks_for_no_golden_answers(world: World) -> None:
    first = (await world.publish(1))["version"]
    second = (await world.publish(2, activate=True))["version"]
    assert world.record.active == second
    world.replicas.problems = ["line 1 misses"]
    await world.changes.rollback("mood", by="us", if_match=None)
    assert world.record.active == first
    assert world.replicas.asked[-2:] == [("warm", "mood", first), ("reach", 3)]


async def test_those_who_do_not_know_in_time_are_named(world: World) -> None:
    world.replicas.waiting_for = ["ingress-1"]
    assert (await world.publish(1))["everywhere"] is False


async def test_the_first_change_takes_a_plain_folder_in(world: World) -> None:
    world.drop("mood", 1)
    version = world.store.read("mood").version
    told = await world.patch(if_match=0, pinned=True)
    assert told["revision"] == 1
    assert world.record.active == world.record.folder == version
    assert world.record.pinned
    assert world.store.read("mood", version).contents == world.store.read("mood").contents
    with pytest.raises(Stale):
        await world.patch(if_match=0, pinned=False)


async def test_an_upload_beside_a_plain_folder_does_not_take_its_place(world: World) -> None:
    world.drop("mood", 1)
    answering = world.store.read("mood").version
    uploaded = (await world.publish(2))["version"]
    assert world.record.active == answering
    assert set(world.record.versions) == {answering, uploaded}


async def test_no_folder_and_no_record_is_no_task(world: World) -> None:
    with pytest.raises(TaskNotFound):
        await world.patch(pinned=True)
    with pytest.raises(TaskNotFound):
        await world.changes.delete("mood", None, by="us", if_match=None)


async def test_a_version_in_use_is_not_deleted_and_another_goes_with_its_files(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.catalog.upkeep._GRACE_S", 0.0)
    first = (await world.publish(1))["version"]
    second = (await world.publish(2))["version"]
    with pytest.raises(Conflict, match="active"):
        await world.changes.delete("mood", first, by="us", if_match=None)
    await world.changes.delete("mood", second, by="us", if_match=None)
    assert world.record.doomed == (second,)
    with pytest.raises(NotReady, match="being deleted; try again in a few seconds"):
        await world.publish(2)
    await world.upkeep._purge()
    assert world.record.doomed == ()
    assert world.files() == [f"mood/{first}/{CONFIG}", f"mood/{first}/{WEIGHTS}"]
    assert (await world.publish(2))["version"] == second


@pytest.mark.parametrize("managed", [False, True])
async def test_a_deleted_task_leaves_no_file(
    world: World, monkeypatch: pytest.MonkeyPatch, managed: bool
) -> None:
    monkeypatch.setattr("deployments.catalog.upkeep._GRACE_S", 0.0)
    world.drop("mood", 1)
    if managed:
        await world.publish(2)
    await world.changes.delete("mood", None, by="us", if_match=None)
    assert world.record.deleted
    await world.upkeep._purge()
    assert world.files() == []
    assert "mood" not in world.ledger.snapshot.tasks
    assert not (world.root / "mood").exists()


async def test_a_deletion_that_cannot_be_carried_out_keeps_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.catalog.upkeep._GRACE_S", 0.0)
    world.drop("linked", 1)
    (world.root / "alias").symlink_to("linked")
    world.drop("mood", 2)
    for task in ("alias", "mood"):
        await world.changes.delete(task, None, by="us", if_match=None)
    await world.upkeep._purge()
    assert world.ledger.snapshot.tasks == {}
    assert sorted(path.name for path in world.root.iterdir() if path.name != "catalog") == [
        "linked"
    ]
    assert len(world.files()) == 2, "what the link led to stays"


async def test_history_comes_in_pages_that_messages_can_carry(world: World) -> None:
    await world.publish(1)
    for number in range(40):
        labels = [f"{number}-{index}-{'x' * 50}" for index in range(900)]
        await world.patch(rules={"labels": labels})
    changes, more = await world.ledger.history(task="mood", before=None, limit=100)
    assert more
    assert 10 < len(changes) < 40
    told = list(changes)
    while more:
        before = told[-1]["revision"]
        changes, more = await world.ledger.history(task="mood", before=before, limit=100)
        told += changes
    assert [one["revision"] for one in told] == list(range(41, 0, -1))


async def test_a_caller_that_goes_away_leaves_no_change_untold(world: World) -> None:
    await world.publish(1)

    async def told() -> int:
        return int((await world.ledger.feed.page(0, "", 0.0))["revision"])

    for number in range(20):
        change = asyncio.ensure_future(world.patch(rules={"threshold": number / 100}))
        await asyncio.sleep(number / 2000)
        change.cancel()
        await asyncio.gather(change, return_exceptions=True)
        async with asyncio.timeout(10):  # the change goes on, and is in the store before it is told
            while not await told() == world.writer.snapshot.revision == world.record.revision:
                await asyncio.sleep(0.01)


async def test_forty_patches_at_once_all_hold_without_if_match(world: World) -> None:
    await world.publish(1)
    told = await asyncio.gather(
        *(world.patch(rules={"threshold": number / 100}) for number in range(40))
    )
    assert sorted(one["revision"] for one in told) == list(range(2, 42))


async def test_a_name_that_was_tried_once_is_not_remembered(world: World) -> None:
    for number in range(100):
        with pytest.raises(TaskNotFound):
            await world.changes.delete(f"no-{number}", None, by="us", if_match=None)
    gc.collect()
    assert len(world.ledger._turns) == 0


async def test_what_a_caller_read_of_a_plain_folder_holds_for_an_upload(world: World) -> None:
    world.drop("mood", 1)
    told = await world.publish(2, if_match=0)
    assert told["created"]
    assert len(world.record.versions) == 2


@pytest.mark.parametrize("change", ["rollback", "rules", "delete"])
async def test_a_refused_change_leaves_a_plain_folder_alone(world: World, change: str) -> None:
    world.drop("mood", 1)
    before = world.files()
    refused = {
        "rollback": lambda: world.changes.rollback("mood", by="us", if_match=None),
        "rules": lambda: world.patch(rules={"treshold": 1}),
        "delete": lambda: world.changes.delete("mood", "0" * 8, by="us", if_match=None),
    }[change]
    with pytest.raises((Conflict, BadInput, VersionNotFound)):
        await refused()
    assert world.ledger.snapshot.tasks == {}
    assert world.files() == before


async def test_an_upload_beside_a_folder_that_is_being_copied_waits(world: World) -> None:
    folder = world.drop("mood", 1)
    (folder / WEIGHTS).write_bytes(content(1)[:-3])
    with pytest.raises(AdapterIncomplete):
        await world.publish(2)
    assert world.ledger.snapshot.tasks == {}
    (folder / WEIGHTS).write_bytes(content(1))
    assert (await world.publish(2))["version"] != world.record.active


async def test_an_upload_mends_a_version_whose_files_are_lost(world: World) -> None:
    version = (await world.publish(1))["version"]
    (world.root / "mood" / version / WEIGHTS).unlink()
    told = await world.publish(1)
    assert (told["version"], told["created"]) == (version, False)
    assert world.store.read("mood", version).version == version


async def test_golden_answers_decide_over_a_share_too(world: World) -> None:
    await world.publish(1)
    second = (await world.publish(2))["version"]
    world.replicas.problems = ["line 1 misses"]
    with pytest.raises(BadInput, match="line 1 misses"):
        await world.patch(traffic={second: 1.0})
    assert world.record.traffic == {}


async def test_a_folder_dropped_after_its_deletion_is_a_new_task(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.catalog.upkeep._GRACE_S", 0.0)
    world.drop("mood", 1)
    await world.changes.delete("mood", None, by="us", if_match=None)
    world.drop("mood", 2)
    await world.upkeep._purge()
    assert "mood" not in world.ledger.snapshot.tasks
    assert len(world.files()) == 2


async def test_nothing_is_purged_before_everybody_knows(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.catalog.upkeep._GRACE_S", 0.0)
    await world.publish(1)
    world.replicas.waiting_for = ["ingress-1"]
    await world.changes.delete("mood", None, by="us", if_match=None)
    await world.upkeep._purge()
    assert len(world.files()) == 2
    world.replicas.waiting_for = []
    await world.upkeep._purge()
    assert world.files() == []


async def test_what_another_cluster_made_anew_is_not_purged(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.catalog.upkeep._GRACE_S", 0.0)
    await world.publish(1)
    second = (await world.publish(2))["version"]
    await world.changes.delete("mood", second, by="us", if_match=None)
    other = World(world.root)
    await other.upkeep._purge()
    assert (await other.publish(2))["version"] == second
    await world.upkeep._purge()
    assert second in world.record.versions
    assert world.store.read("mood", second).version == second


async def test_a_folder_that_no_model_could_check_is_taken_in_later(world: World) -> None:
    folder = world.drop("mood", 1)
    await world.patch(pinned=True)
    (folder / WEIGHTS).write_bytes(content(2))
    world.replicas.away = True
    for _ in range(3):
        await world.adoption.scan()
    assert len(world.record.versions) == 1
    world.replicas.away = False
    for _ in range(3):
        await world.adoption.scan()
    assert len(world.record.versions) == 2


async def test_deleted_files_stay_for_requests_that_are_on_their_way(world: World) -> None:
    await world.publish(1)
    await world.changes.delete("mood", None, by="us", if_match=None)
    await world.upkeep._purge()
    assert len(world.files()) == 2


async def test_a_changed_folder_is_taken_in_and_active_if_it_was(world: World) -> None:
    folder = world.drop("mood", 1)
    await world.patch(pinned=True)
    first = world.record.active
    (folder / WEIGHTS).write_bytes(content(2))
    for _ in range(3):
        await world.adoption.scan()
    second = world.record.active
    assert second == world.record.folder == world.store.read("mood").version != first
    await world.changes.rollback("mood", by="us", if_match=None)
    (folder / WEIGHTS).write_bytes(content(3))
    for _ in range(3):
        await world.adoption.scan()
    assert world.record.active == first, "whoever activated another one is obeyed"
    assert len(world.record.versions) == 3
    (folder / CONFIG).write_text('{"bad": 1}')
    for _ in range(3):
        await world.adoption.scan()
    assert len(world.record.versions) == 3


async def test_a_changed_folder_that_misses_its_golden_answers_leaves_no_version(
    world: World,
) -> None:
    folder = world.drop("mood", 1)
    await world.patch(pinned=True)
    first = world.record
    (folder / WEIGHTS).write_bytes(content(2))
    before = world.files()
    world.replicas.problems = ["line 3 misses"]
    for _ in range(4):
        await world.adoption.scan()
    world.replicas.problems = []
    for _ in range(4):
        await world.adoption.scan()
    assert world.record == first
    assert world.files() == before


async def test_a_refused_folder_keeps_no_version_out_and_is_checked_once(world: World) -> None:
    versions = [digest({CONFIG: b"{}", WEIGHTS: content(number)}) for number in range(2)]
    (world.drop("mood", 7) / CONFIG).write_text('{"bad": 1}')
    for number, version in enumerate(versions):
        world.drop("mood", number, version)
    world.drop("mood", 1, "0" * 8)  # never taken, so that each scan tries again
    world.replicas.faults["describe"] = NotReady("no model replica is running")
    for _ in range(3):
        await world.adoption.scan()
    assert world.replicas.asked.count(("check", "mood", True)) == 1
    world.replicas.faults.clear()
    for _ in range(3):
        await world.adoption.scan()
    assert set(world.record.versions) == set(versions)
    (world.root / "mood" / CONFIG).write_text("{}")
    for _ in range(3):
        await world.adoption.scan()
    assert world.record.folder == world.store.read("mood").version


async def test_a_folder_is_looked_at_when_its_mark_is_another_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mood", "spam", "topic"):
        world.drop(name, 1)
    await world.patch(pinned=True)
    looked: list[str] = []
    look = world.store.look
    monkeypatch.setattr(world.store, "look", lambda task: looked.append(task) or look(task))
    for _ in range(3):
        await world.adoption.scan()
    assert looked == ["mood", "mood"], "the others are nobody's"
    looked.clear()
    (world.root / "spam" / WEIGHTS).write_bytes(content(2))
    await world.adoption.scan()
    assert looked == []
    (world.root / "mood" / WEIGHTS).write_bytes(content(2))
    for _ in range(4):  # what is taken in becomes a version folder there
        await world.adoption.scan()
    assert set(looked) == {"mood"}
    assert world.record.active == world.record.folder == world.store.read("mood").version
    looked.clear()
    await world.adoption.scan()
    assert looked == []


async def test_a_folder_that_changed_while_its_task_became_managed_is_taken_in(
    world: World,
) -> None:
    folder = world.drop("mood", 1)
    (folder / WEIGHTS).write_bytes(content(1))
    found = await world.adoption.find("mood", "us")
    (folder / WEIGHTS).write_bytes(content(2))
    await world.adoption.scan()
    await world.ledger.commit(found.taken_in, by="us", task="mood", what={})
    for _ in range(3):
        await world.adoption.scan()
    assert world.record.active == world.store.read("mood").version != found.version


async def test_of_two_thousand_tasks_a_changed_folder_answers_within_two_seconds(
    world: World,
) -> None:
    names = [f"task-{number:04}" for number in range(2000)]
    for name in names:
        world.drop(name, 1)
    version = world.store.read(names[0]).version

    def all_taken_in(snapshot: Snapshot) -> Snapshot:
        for name in names:
            snapshot = state.adopt(snapshot, name, version, "us", 0.0, if_match=0)
        return snapshot

    await world.ledger.commit(all_taken_in, by="us", task=names[0], what={})
    for _ in range(2):  # a catalog that starts reads what it finds
        await world.adoption.scan()
    world.upkeep.start()
    taken_s = []
    for number in range(2, 7):
        await asyncio.sleep(0.2 * number)
        started_s = time.monotonic()
        task = names[number * 300]
        (world.root / task / WEIGHTS).write_bytes(content(number))
        while world.ledger.snapshot.tasks[task].active == version:
            assert time.monotonic() - started_s < 30
            await asyncio.sleep(0.01)
        taken_s.append(time.monotonic() - started_s)
    world.upkeep.stop()
    assert statistics.median(taken_s) < 2.0, taken_s  # one may be slow on a busy machine


async def test_version_folders_that_lie_there_are_taken_in(world: World) -> None:
    versions = [digest({CONFIG: b"{}", WEIGHTS: content(number)}) for number in range(3)]
    for number, version in enumerate(versions):
        world.drop("mood", number, version)
        await asyncio.sleep(0.02)
    world.drop("wrong", 1, "0" * 8)
    await world.adoption.scan()
    assert set(world.record.versions) == set(versions)
    assert world.record.active == versions[-1], "the latest"
    assert "wrong" not in world.ledger.snapshot.tasks
    later = digest({CONFIG: b"{}", WEIGHTS: content(7)})
    world.drop("mood", 7, later)
    await world.adoption.scan()
    assert set(world.record.versions) == {*versions, later}
    assert world.record.active == versions[-1]


async def test_a_publication_that_died_is_neither_seen_nor_left(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = world.stage(1)
    version = world.store.read_staged(staging, "mood").version
    world.store.publish(staging, "mood", version)  # and the process dies here
    later = World(world.root)
    await later.adoption.scan()
    assert "mood" not in later.ledger.snapshot.tasks
    monkeypatch.setattr("deployments.catalog.upkeep._DEAD_S", -1.0)
    await later.upkeep._clear_unfinished()
    assert later.files() == []


async def test_a_version_that_fails_too_often_loses_its_share(world: World) -> None:
    from deployments.usage import Usage

    await world.publish(1)
    second = (await world.publish(2))["version"]
    await world.patch(traffic={second: 0.5}, max_error_rate=0.1)
    world.usage._clock = lambda: float("inf")
    counted = [Usage(task="mood", version=second, num_rows=40, num_errors=10)]
    world.usage.add(counted, world.ledger.snapshot)
    await world.upkeep._watch()
    assert world.record.traffic == {}
    (last, *_), _ = await world.ledger.history(task="mood", before=None, limit=10)
    assert last["by"] == "guard"
    assert last["what"]["returned"] == second
    assert "10 of 40 rows failed" in last["what"]["reason"]


async def test_the_upkeep_goes_on_when_a_part_of_it_fails(world: World) -> None:
    shutil.rmtree(world.root, ignore_errors=True)
    world.upkeep.start()
    await asyncio.sleep(0.1)
    assert world.upkeep.alive
    world.upkeep.stop()
    await asyncio.sleep(0)
    assert not world.upkeep.alive
