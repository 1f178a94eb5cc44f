"""Processes that change a catalog until they are killed: `python -m tests.catalog.stream`.

Each line on stdin is a directory, a task's prefix, and after how many system calls that matter the
process kills itself (0 for never); a process is forked for each. It says `pid N`, then `ack N` for
each change that is durable, and `dead` when it is.
"""

import os
import signal
import sys
from datetime import UTC, datetime
from typing import Any

from adapters.documents import open_documents
from deployments.catalog import state
from deployments.catalog.writer import Writer
from deployments.snapshot import Snapshot, TaskPatch

NUM_TASKS = 3
CALLS = ("open", "fsync", "link", "unlink", "scandir", "mkdir")


def transition(number: int) -> tuple[str, Any]:
    """Return the task and the transition of the n-th change, each of which changes something."""
    task, turn = f"task-{number % NUM_TASKS}", number // NUM_TASKS
    if turn == 0:
        return task, lambda s: state.add_version(
            s, task, "0" * 8, "upload", "us", 1.5, activate=False, if_match=None
        )
    return task, lambda s: state.patch(s, task, TaskPatch(rules={"max_length": turn}), None)


def numbers(snapshot: Snapshot) -> int:
    """Return how many changes a snapshot has, of 0, 1, 2…; fail if it has half of one."""
    turns = [
        record.rules["max_length"] + 1 if record.rules else 1
        for _, record in sorted(snapshot.tasks.items())
    ]
    assert turns == sorted(turns, reverse=True)
    assert not turns or turns[0] - turns[-1] <= 1
    assert list(snapshot.tasks) == [f"task-{n}" for n in range(len(turns))]
    assert sum(turns) == snapshot.revision
    return sum(turns)


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
    writer = Writer(open_documents(directory))
    number = numbers(writer.refresh())
    if num_calls:
        die_after(num_calls)
    while not num_calls or number < 200:
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
