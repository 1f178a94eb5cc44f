"""Several writers on one store: what came of it is one serial order of what was acknowledged."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.documents import open_documents
from deployments.catalog.writer import Writer
from deployments.journal import Journal
from deployments.snapshot import Snapshot
from tests.catalog.clients import TASKS, VERSIONS, apply, begin, run
from tests.catalog.s3 import S3

ROOT = Path(__file__).parents[2]


def check_serial(journal: Journal, taken: dict[str, list[int]]) -> None:
    """Replay the history, with its conditions, and compare what comes of it with what is there."""
    newest, _ = journal.newest()
    changes = journal.history(task=None, before=None, limit=10_000)[::-1]
    assert [change.revision for change in changes] == list(range(1, newest.revision + 1))
    replayed = Snapshot()
    for change in changes:
        replayed = apply(replayed, change.task, change.what, change.what["if_match"])
        assert replayed.revision == change.revision
    assert replayed == newest
    for name, revisions in taken.items():
        assert [change.revision for change in changes if change.by == name] == revisions
    for task in TASKS:
        told = journal.history(task=task, before=None, limit=10_000)[::-1]
        assert told == [change for change in changes if change.task == task]


def test_eight_processes_that_change_the_same_tasks(tmp_path: Path) -> None:
    writer = Writer(open_documents(str(tmp_path)))
    begin(writer)
    clients = {
        name: subprocess.Popen(
            [sys.executable, "-m", "tests.catalog.clients", str(tmp_path), name, "200"],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for name in (f"client-{number}" for number in range(8))
    }  # fmt: skip
    taken, total_stale = {}, 0
    for name, client in clients.items():
        said, _ = client.communicate(timeout=300)
        num_stale, *revisions = map(int, said.split())
        assert num_stale + len(revisions) == 200
        taken[name] = revisions
        total_stale += num_stale
    num_taken = sum(map(len, taken.values()))
    assert num_taken == 1600 - total_stale
    assert total_stale > 0, "nobody ever lost a race, so this has shown nothing"
    assert writer.refresh().revision == len(TASKS) * len(VERSIONS) + num_taken
    check_serial(writer.journal, taken)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with S3().running() as server:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server.bucket()


@pytest.mark.parametrize("place", ["directory", "s3"])
def test_two_clusters_on_one_store_lose_nothing(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("bucket") if place == "s3" else str(tmp_path)
    writers = [Writer(open_documents(url)) for _ in range(2)]
    begin(writers[0])
    taken: dict[str, list[int]] = {}

    def work(number: int) -> None:
        taken[f"writer-{number}"], _ = run(writers[number], f"writer-{number}", 20)

    threads = [threading.Thread(target=work, args=[number]) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(map(len, taken.values())) > 0
    assert writers[0].refresh() == writers[1].refresh()
    check_serial(writers[0].journal, taken)
