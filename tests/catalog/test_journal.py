import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from adapters.documents import FolderDocuments, open_documents
from deployments.catalog import state
from deployments.catalog.writer import Writer
from deployments.journal import NUM_KEPT, CatalogUnreadable, Journal
from deployments.snapshot import TaskPatch

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def change(writer: Writer, task: str, number: int) -> None:
    """Make a change; the first of a task makes the task."""

    def transition(snapshot: Any) -> Any:
        if task not in snapshot.tasks:
            return state.add_version(
                snapshot, task, "0" * 8, "upload", "us", 1.5, activate=False, if_match=None
            )
        return state.patch(snapshot, task, TaskPatch(rules={"max_length": number + 1}), None)

    writer.commit(transition, by="us", task=task, what={"number": number}, now=NOW)


def test_history_is_paged_for_all_tasks_and_for_one(tmp_path: Path) -> None:
    writer = Writer(open_documents(str(tmp_path)))
    for number in range(90):
        change(writer, "rare" if number % 30 == 7 else "mood", number)

    def pages(task: str | None) -> list[list[int]]:
        found, before = [], None
        while True:
            page = writer.journal.history(task=task, before=before, limit=40)
            if not page:
                return found
            found.append([one.revision for one in page])
            before = page[-1].revision

    assert pages(None) == [list(range(90, 50, -1)), list(range(50, 10, -1)), list(range(10, 0, -1))]
    assert pages("rare") == [[68, 38, 8]]
    assert [n for page in pages("mood") for n in page] == [
        n for n in range(90, 0, -1) if n not in (68, 38, 8)
    ]
    assert pages("other") == []
    found = writer.journal.history(task="rare", before=50, limit=1)
    assert [one.revision for one in found] == [38]


def test_history_tells_of_a_task_that_is_gone(tmp_path: Path) -> None:
    writer = Writer(open_documents(str(tmp_path)))
    for number in range(3):
        change(writer, "gone", number)
        change(writer, "mood", number)
    for transition in (
        lambda s: state.delete_task(s, "gone", None),
        lambda s: state.claim_purge(s, "gone", None, "us", None),
        lambda s: state.purged(s, "gone", None, "us"),
    ):
        writer.commit(transition, by="us", task="gone", what={}, now=NOW)
    change(writer, "mood", 9)
    told = writer.journal.history(task="gone", before=None, limit=10)
    assert [one.revision for one in told] == [9, 8, 7, 5, 3, 1]


def test_a_change_whose_writer_was_killed_is_told_and_written_by_the_next(tmp_path: Path) -> None:
    first = Writer(open_documents(str(tmp_path)))
    for number in range(3):
        change(first, "mood", number)
    whole = first.journal.history(task="mood", before=None, limit=10)
    lost = tmp_path / "catalog/history/2.json"
    content = lost.read_bytes()
    lost.unlink()
    second = Writer(open_documents(str(tmp_path)))
    assert second.journal.history(task="mood", before=None, limit=10) == whole
    assert not lost.exists()
    change(second, "mood", 3)
    assert lost.read_bytes() == content


def test_no_revision_goes_before_its_change_is_written(tmp_path: Path) -> None:
    class Full(FolderDocuments):
        """A disk that takes no history of revision 1."""

        def create(self, path: str, content: bytes) -> None:
            if path == "catalog/history/1.json":
                raise OSError(28, "no space left on device")
            super().create(path, content)

    writer = Writer(Full(tmp_path))
    with pytest.raises(OSError, match="no space"):
        change(writer, "mood", 0)
    for number in range(1, NUM_KEPT + 5):
        change(writer, "mood", number)
    assert (tmp_path / "catalog/1.json").exists()
    told = writer.journal.history(task="mood", before=None, limit=100)
    assert [one.revision for one in told] == list(range(NUM_KEPT + 5, 0, -1))
    change(Writer(open_documents(str(tmp_path))), "mood", 99)
    assert not (tmp_path / "catalog/1.json").exists()


def test_what_is_pruned_while_it_is_read_is_read_anew(tmp_path: Path) -> None:
    writer = Writer(open_documents(str(tmp_path)))
    change(writer, "mood", 0)

    class Slow(FolderDocuments):
        """Between its listing and its reading others write more than is kept, once."""

        is_slow = True

        def names(self, folder: str) -> list[str]:
            names = super().names(folder)
            if self.is_slow:
                self.is_slow = False
                for number in range(NUM_KEPT + 3):
                    change(writer, "mood", number + 1)
            return names

    assert Journal(Slow(tmp_path)).newest() == writer.snapshot


def test_a_reader_beside_writers_never_goes_back(tmp_path: Path) -> None:
    writers = [Writer(open_documents(str(tmp_path))) for _ in range(2)]
    change(writers[0], "mood", 0)

    def work(writer: Writer, offset: int) -> None:
        for number in range(150):
            change(writer, "mood", 2 * number + offset)

    threads = [
        threading.Thread(target=work, args=[writer, offset])
        for offset, writer in enumerate(writers)
    ]
    for thread in threads:
        thread.start()
    journal, seen = Journal(open_documents(str(tmp_path))), [0]
    while any(thread.is_alive() for thread in threads):
        seen.append(journal.newest().revision)
    for thread in threads:
        thread.join()
    assert seen == sorted(seen)
    assert len(set(seen)) > 10
    assert journal.newest().revision > NUM_KEPT


def test_a_revision_that_somebody_removed_is_missed_aloud(tmp_path: Path) -> None:
    writer = Writer(open_documents(str(tmp_path)))
    for number in range(3):
        change(writer, "mood", number)
    for path in (tmp_path / "catalog").glob("3.json"):
        path.unlink()
    fresh = Writer(open_documents(str(tmp_path)))
    fresh.refresh()
    with pytest.raises(CatalogUnreadable, match=r"history/3\.json tells of a revision"):
        change(fresh, "mood", 9)
    for path in (tmp_path / "catalog").glob("*.json"):
        path.unlink()
    for attempt in (
        lambda: Writer(open_documents(str(tmp_path))).refresh(),
        lambda: change(Writer(open_documents(str(tmp_path))), "mood", 9),
    ):
        with pytest.raises(CatalogUnreadable, match="history tells of revisions"):
            attempt()
    assert not list((tmp_path / "catalog").glob("*.json"))


def test_several_transitions_are_one_revision(tmp_path: Path) -> None:
    writer = Writer(open_documents(str(tmp_path)))
    change(writer, "mood", 0)

    def both(snapshot: Any) -> Any:
        adopted = state.adopt(snapshot, "topic", "1" * 8, "us", 1.5)
        return state.patch(adopted, "topic", TaskPatch(pinned=True), None)

    snapshot = writer.commit(both, by="us", task="topic", what={}, now=NOW)
    assert snapshot.revision == snapshot.tasks["topic"].revision == 2
    assert snapshot.tasks["mood"].revision == 1
    assert writer.journal.newest() == snapshot
