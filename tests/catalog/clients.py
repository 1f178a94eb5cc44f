"""A client that changes a catalog beside others: `python -m tests.catalog.clients URL NAME NUM`."""

import random
import sys
from datetime import UTC, datetime
from typing import Any

from adapters.documents import open_documents
from deployments.catalog import state
from deployments.catalog.writer import Writer
from deployments.errors import Stale
from deployments.snapshot import Snapshot, TaskPatch

VERSIONS = ["0" * 8, "1" * 8, "2" * 8]
TASKS = ["mood", "topic", "spam"]


def begin(writer: Writer) -> None:
    for task in TASKS:
        for version in VERSIONS:
            change(writer, "begin", task, {"add": version}, None)


def apply(snapshot: Snapshot, task: str, what: dict[str, Any], if_match: int | None) -> Snapshot:
    """Make a change as its history tells it."""
    if "add" in what:
        return state.add_version(
            snapshot, task, what["add"], "upload", "us", 1.5, activate=False, if_match=if_match
        )
    return state.patch(snapshot, task, TaskPatch.model_validate(what["patch"]), if_match)


def change(
    writer: Writer, by: str, task: str, what: dict[str, Any], if_match: int | None
) -> Snapshot:
    told = {**what, "if_match": if_match}
    return writer.commit(
        lambda s: apply(s, task, what, if_match), by=by, task=task, what=told, now=datetime.now(UTC)
    )


def run(writer: Writer, name: str, num_changes: int) -> tuple[list[int], int]:
    """Make changes with If-Match; return the revisions of those taken, and how many were not."""
    chance = random.Random(name)
    taken, num_stale = list[int](), 0
    for number in range(num_changes):
        task, version = chance.choice(TASKS), chance.choice(VERSIONS[1:])
        # Each patch is one that nobody else makes, so that it always changes something.
        share = (1 + number) / (num_changes + 1)
        patch = {"traffic": {version: share}, "rules": {"labels": [name, str(number)]}}
        seen = writer.refresh().tasks[task].revision
        try:
            taken.append(change(writer, name, task, {"patch": patch}, seen).revision)
        except Stale:
            num_stale += 1
    return taken, num_stale


if __name__ == "__main__":
    url, name, num_changes = sys.argv[1:]
    taken, num_stale = run(Writer(open_documents(url)), name, int(num_changes))
    print(num_stale, *taken)
