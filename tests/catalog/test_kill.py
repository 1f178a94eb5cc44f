"""kill -9 of what writes the catalog: what it acknowledged is there, and no half of more."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.documents import open_documents
from adapters.store import open_store
from deployments.journal import NUM_KEPT, Journal
from tests.catalog.stream import numbers

ROOT = Path(__file__).parents[2]


class Victims:
    """Processes that change a catalog, one after the other."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.catalog.stream"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def start(self, directory: Path, num_calls: int = 0) -> None:
        assert self._server.stdin
        self._server.stdin.write(f"{directory}\t{num_calls}\n")

    def say(self) -> list[str]:
        assert self._server.stdout
        return self._server.stdout.readline().split()

    def kill(self, directory: Path, after_acks: int, after_s: float) -> int:
        """Kill a process some time after a number of its changes; return the last that it told."""
        self.start(directory)
        pid = last = 0
        while after_acks:
            kind, number = self.say()
            if kind == "pid":
                pid = int(number)
            else:
                last, after_acks = int(number), after_acks - 1
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
        return self.last(last)

    def last(self, last: int = 0) -> int:
        while (said := self.say()) != ["dead"]:
            if said[0] == "ack":
                last = int(said[1])
        return last

    def stop(self) -> None:
        with self._server:
            assert self._server.stdin
            self._server.stdin.close()


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    some = Victims()
    yield some
    some.stop()


def found(directory: Path) -> int:
    """Read a catalog, and all its history, as the next process will; return its revision."""
    journal = Journal(open_documents(str(directory)))
    snapshot = journal.newest()
    changes = journal.history(task=None, before=None, limit=10_000)
    assert [change.revision for change in changes] == list(range(snapshot.revision, 0, -1))
    store = open_store(str(directory))
    for task, record in snapshot.tasks.items():
        for version in record.versions:
            assert store.read(task, version).version == version
        # A purge that was on its way, or an upload, may have been killed before it was written.
        beside = {*store.versions(task)} - record.versions.keys() - {*record.doomed}
        assert len(beside) <= 1
    return numbers(snapshot)


def test_a_catalog_that_is_killed_a_hundred_times(tmp_path: Path, victims: Victims) -> None:
    chance = random.Random(5)
    told = 0
    for _ in range(100):
        before = told
        told = victims.kill(tmp_path, chance.randint(1, 4), chance.random() * 0.01)
        assert told > before
        assert found(tmp_path) - told in (0, 1)
    revision = found(tmp_path)
    kept = sorted(int(path.stem) for path in (tmp_path / "catalog").glob("*.json"))
    assert kept[-1] == revision
    # The last may have been killed just before it pruned.
    assert NUM_KEPT <= len(kept) <= NUM_KEPT + 1


def test_a_writer_that_is_killed_at_each_call_in_turn(tmp_path: Path, victims: Victims) -> None:
    """Around each system call of a start and two changes, on a catalog that has some to prune."""
    base = tmp_path / "base"
    base.mkdir()
    victims.kill(base, NUM_KEPT + 5, 0)
    begun = found(base)
    num_calls, told = 0, begun
    while told < begun + 2:
        num_calls += 1
        directory = tmp_path / str(num_calls)
        shutil.copytree(base, directory)
        victims.start(directory, num_calls)
        told_before, told = told, victims.last(begun)
        assert told >= told_before
        assert found(directory) - told in (0, 1)
        # And the next process goes on from there, as if nothing had been.
        assert told < victims.kill(directory, 1, 0) <= found(directory)
    assert num_calls > 40
