"""Processes that change a catalog until they are killed: `python -m tests.catalog.stream`.

Each line on stdin is a directory, a task's prefix, and after how many system calls that matter the
process kills itself (0 for never); a process is forked for each. It says `pid N`, then `ack N` for
each change that is durable, and `dead` when it is.
"""

import functools
import io
import os
import signal
import sys
from datetime import UTC, datetime
from typing import Any

from adapters.documents import open_documents
from adapters.store import CONFIG, WEIGHTS, Store, digest, open_store
from deployments.catalog import state
from deployments.catalog.writer import Writer
from deployments.snapshot import Snapshot, TaskPatch

NUM_TASKS = 3
CALLS = ("open", "fsync", "link", "unlink", "scandir", "mkdir", "rename", "rmdir")
KINDS = ("upload", "patch", "upload", "delete", "claim", "purge", "patch")
"""What becomes of a task, again and again: its turns, one a change."""


@functools.cache
def version(number: int) -> str:
    """Return the version that the n-th upload to a task brings."""
    return digest({CONFIG: b"{}", WEIGHTS: content(number)})


def content(number: int) -> bytes:
    """An empty safetensors file; another number makes another version."""
    header = b'{"__metadata__":{"n":"%d"}}' % number
    return len(header).to_bytes(8, "little") + header


def uploads(turn: int) -> int:
    """Return how many uploads a task has had before a turn."""
    rounds, rest = divmod(turn, len(KINDS))
    return rounds * KINDS.count("upload") + KINDS[:rest].count("upload")


def transition(number: int) -> tuple[str, Any]:
    """Return the task and the transition of the n-th change, each of which changes something.

    Each round brings two versions, of which the first answers until the second does, and is then
    deleted and purged.
    """
    task, turn = f"task-{number % NUM_TASKS}", number // NUM_TASKS
    kind = KINDS[turn % len(KINDS)]
    old = version(uploads(turn) - 2)
    if kind == "upload":
        new = version(uploads(turn))
        return task, lambda s: state.add_version(
            s, task, new, "upload", "us", 1.5, activate=True, if_match=None
        )
    if kind == "delete":
        return task, lambda s: state.delete_version(s, task, old, None)
    if kind == "claim":
        return task, lambda s: state.claim_purge(s, task, old, "us", None)
    if kind == "purge":
        return task, lambda s: state.purged(s, task, old, "us")
    return task, lambda s: state.patch(s, task, TaskPatch(rules={"max_length": turn}), None)


def work(store: Store, number: int) -> None:
    """Do to the store what comes before the n-th change is written, as the catalog does."""
    task, turn = f"task-{number % NUM_TASKS}", number // NUM_TASKS
    kind = KINDS[turn % len(KINDS)]
    if kind == "upload":
        new = uploads(turn)
        staging = store.stage({CONFIG: io.BytesIO(b"{}"), WEIGHTS: io.BytesIO(content(new))})
        store.publish(staging, task, version(new))
        store.discard(staging)
    elif kind == "purge":
        store.remove(task, version(uploads(turn) - 2))


@functools.cache
def after(number: int) -> Snapshot:
    """Return what so many changes make, one after the other: the oracle."""
    if number == 0:
        return Snapshot()
    before = after(number - 1)
    changed = transition(number - 1)[1](before)
    assert changed.revision == number
    return changed


def numbers(snapshot: Snapshot) -> int:
    """Return how many changes a snapshot has; fail if it has half of one."""
    for earlier in range(snapshot.revision):
        after(earlier)  # so that none is a deep recursion
    assert snapshot == after(snapshot.revision)
    return snapshot.revision


def die_after(num_calls: int) -> None:
    """Kill this process right before or after a system call of those that the catalog makes."""
    left = num_calls

    def counted(call: Any) -> Any:
        def called(*args: Any, **given: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **given)
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return called

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def change(directory: str, num_calls: int) -> None:
    writer, store = Writer(open_documents(directory)), open_store(directory)
    number = numbers(writer.refresh())
    if num_calls:
        die_after(num_calls)
    while not num_calls or number < 200:
        work(store, number)
        task, next_one = transition(number)
        writer.commit(next_one, by="us", task=task, what={}, now=datetime.now(UTC))
        number += 1
        os.write(1, b"ack %d\n" % number)


def main() -> None:
    for line in sys.stdin:
        directory, num_calls = line.split("\t")
        child = os.fork()
        if child == 0:
            change(directory, int(num_calls))
            os._exit(0)
        os.write(1, b"pid %d\n" % child)
        os.waitpid(child, 0)
        os.write(1, b"dead\n")


if __name__ == "__main__":
    main()
