"""Several writers on one store: what came of it is one serial order of what was acknowledged."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from adapters.documents import open_documents
from deployments.catalog import state
from deployments.catalog.writer import Writer
from deployments.journal import Journal
from deployments.snapshot import Snapshot
from tests.catalog.clients import TASKS, VERSIONS, apply, begin, change, run
from tests.catalog.s3 import S3

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROOT = Path(__file__).parents[2]


def check_serial(journal: Journal, taken: dict[str, list[int]]) -> None:
    """Replay the history, with its conditions, and compare what comes of it with what is there."""
    newest = journal.newest()
    changes = journal.history(task=None, before=None, limit=10_000)[::-1]
    assert [one.revision for one in changes] == list(range(1, newest.revision + 1))
    replayed = Snapshot()
    for one in changes:
        replayed = apply(replayed, one.task, one.what, one.what["if_match"])
        assert replayed.revision == one.revision
    assert replayed == newest
    for name, revisions in taken.items():
        assert [one.revision for one in changes if one.by == name] == revisions
    for task in TASKS:
        told = journal.history(task=task, before=None, limit=10_000)[::-1]
        assert told == [one for one in changes if one.task == task]


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
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    with S3().running() as one:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", one.url)
        yield one


@pytest.fixture
def bucket(server: S3) -> str:
    return server.bucket()


@pytest.mark.parametrize("place", ["directory", "s3", "gs"])
def test_two_clusters_on_one_store_lose_nothing(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path)
    if place == "s3":
        url = request.getfixturevalue("bucket")
    if place == "gs":
        request.getfixturevalue("gs")
        url = "gs://bucket/store"
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


def test_an_answer_that_s3_lost_makes_no_change_twice(bucket: str, server: S3) -> None:
    """A rollback goes back one version, though the first attempt's answer never came."""
    writer = Writer(open_documents(bucket))
    begin(writer)
    for version in VERSIONS[1:]:
        change(writer, "us", "mood", {"patch": {"active": version}}, None)
    lost = set()

    def lose(app: Any, environ: dict[str, Any], start: Any) -> Any:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] != "PUT" or path in lost:
            return app(environ, start)
        lost.add(path)
        b"".join(app(environ, lambda *told: None))
        start("500 Internal Server Error", [("Content-Length", "0")])
        return [b""]

    server.meddle = lose
    snapshot = writer.commit(
        lambda s: state.rollback(s, "mood", None), by="us", task="mood", what={}, now=NOW
    )
    assert len(lost) == 2
    assert snapshot.tasks["mood"].active == VERSIONS[1]
    assert writer.journal.newest() == snapshot
