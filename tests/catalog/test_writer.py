import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from adapters.documents import Documents, open_documents
from deployments.catalog import state
from deployments.catalog.writer import Writer
from deployments.errors import Stale
from deployments.journal import NUM_KEPT, CatalogFormat, CatalogUnreadable, Change, Journal
from deployments.snapshot import Snapshot, TaskPatch

ONE, TWO = "1" * 8, "2" * 8
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def commit(writer: Writer, transition: Any, task: str = "mood", **what: Any) -> Snapshot:
    return writer.commit(transition, by="us", task=task, what=what, now=NOW)


def add(version: str, task: str = "mood", if_match: int | None = None) -> Any:
    return lambda snapshot: state.add_version(
        snapshot, task, version, "upload", "us", 1.5, activate=False, if_match=if_match
    )


def pin(pinned: bool, if_match: int | None = None) -> Any:
    return lambda s: state.patch(s, "mood", TaskPatch(pinned=pinned), if_match)


def test_what_was_written_is_read(documents: Documents) -> None:
    writer = Writer(documents)
    assert writer.journal.newest() == Snapshot()
    written = commit(writer, add(ONE), version=ONE)
    assert writer.snapshot == written
    snapshot = Journal(documents).newest()
    (change,) = Journal(documents).history(task=None, before=None, limit=2)
    assert snapshot == written
    assert snapshot.revision == snapshot.tasks["mood"].revision == 1
    assert (change.by, change.task, change.what, change.was) == ("us", "mood", {"version": ONE}, 0)
    assert datetime.fromisoformat(change.time) == NOW
    assert Writer(documents).refresh() == written


def test_what_changes_nothing_is_no_revision(documents: Documents) -> None:
    writer = Writer(documents)
    first = commit(writer, add(ONE))
    assert commit(writer, add(ONE)) is first
    assert Journal(documents).newest().revision == 1


def test_two_writers_see_and_judge_what_the_other_wrote(documents: Documents) -> None:
    one, two = Writer(documents), Writer(documents)
    commit(one, add(ONE))
    commit(two, add(TWO))
    assert one.refresh().tasks["mood"].versions.keys() == {ONE, TWO}
    with pytest.raises(Stale, match="etag 2, not 1"):
        commit(one, pin(True, if_match=1))
    assert commit(one, pin(True, if_match=2)).revision == 3
    # The other has not been told, and is asked on behalf of somebody who was.
    assert commit(two, pin(False, if_match=3)).revision == 4


def test_a_writer_that_slept_through_all_that_is_pruned_takes_no_number(tmp_path: Path) -> None:
    documents = open_documents(str(tmp_path))
    awake, asleep = Writer(documents), Writer(documents)
    commit(awake, add(ONE))
    asleep.refresh()
    for n in range(NUM_KEPT + 5):
        commit(awake, pin(n % 2 == 0))
    assert not (tmp_path / "catalog/2.json").exists()
    # As if it had looked, been stopped for an hour, and gone on: it writes what it believes in.
    old = asleep.snapshot
    change = Change(revision=2, time="", by="", task="mood", what={}, id="x")
    with pytest.raises(FileExistsError):
        asleep.journal.write(old.model_copy(update={"revision": 2}), change)
    assert not (tmp_path / "catalog/2.json").exists()
    assert asleep.refresh() == awake.snapshot


def test_old_revisions_go_and_their_changes_stay(tmp_path: Path) -> None:
    writer = Writer(open_documents(str(tmp_path)))
    commit(writer, add(ONE))
    for n in range(50):
        commit(writer, pin(n % 2 == 0), n=n)
    kept = sorted(int(path.stem) for path in (tmp_path / "catalog").glob("*.json"))
    assert kept == list(range(51 - NUM_KEPT + 1, 52))
    changes = writer.journal.history(task=None, before=None, limit=100)
    assert [change.revision for change in changes] == list(range(51, 0, -1))
    assert changes[0].what == {"n": 49}


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        ({"format": 2, "revision": 3}, CatalogFormat, "format 2.*format 1"),
        ({"format": 1, "revision": 3}, CatalogUnreadable, r"catalog/3\.json"),
        (b'{"format": 1, "revi', CatalogUnreadable, r"catalog/3\.json"),
        (b"", CatalogUnreadable, r"catalog/3\.json"),
    ],
)
def test_what_cannot_be_read_is_refused_and_left_alone(
    tmp_path: Path, content: Any, error: type[Exception], says: str
) -> None:
    documents = open_documents(str(tmp_path))
    before, during = Writer(documents), Writer(documents)
    for writer in (before, during):
        commit(writer, add(ONE))
        commit(writer, add(TWO))
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    documents.create("catalog/3.json", raw)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    for writer in (during, Writer(documents)):
        for attempt in (
            writer.refresh,
            lambda writer=writer: commit(writer, pin(True)),
            lambda writer=writer: commit(writer, add(ONE)),
            writer.journal.newest,
            lambda writer=writer: writer.journal.newer(2),
            lambda writer=writer: writer.journal.history(task=None, before=None, limit=5),
        ):
            with pytest.raises(error, match=says):
                attempt()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == files
