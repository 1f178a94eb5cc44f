"""What is on its way into a store: its place, its names, its limits and its marker. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import IO, BinaryIO

from adapters.errors import TASK_NAME, VERSION_NAME, AdapterRefused, StagingTooLarge, TaskNotFound
from adapters.store import READ, limit_bytes

FOLDER = ".staging"
FILES = "files"
MARKER = "publishing.json"
MAX_MARKER_BYTES = 1024
STAGING_NAME = re.compile(r"[0-9a-f]{32}")
_CHUNK_BYTES = 2**20


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError with a sentence if a name is no file of an adapter."""
    wrong = sorted(name for name in names if name not in READ)
    if wrong:
        raise ValueError(f"no file of an adapter: {', '.join(map(repr, wrong))}")


def copy_bounded(name: str, source: BinaryIO, target: IO[bytes]) -> None:
    """Copy a file, of one that is over its limit just enough to see that.

    Raises:
        StagingTooLarge: It is over its limit.
    """
    left = limit_bytes(name)
    while chunk := source.read(min(_CHUNK_BYTES, left + 1)):
        left -= len(chunk)
        if left < 0:
            raise StagingTooLarge(name, limit_bytes(name))
        target.write(chunk)


def not_there(task: str) -> AdapterRefused:
    """Return the error of a staging that somebody has discarded."""
    return AdapterRefused(task, ["what was uploaded is not there any more; send it again"])


def check_version(task: str, version: str) -> None:
    """Raise an error if these can be no task and version."""
    if not TASK_NAME.fullmatch(task):
        raise TaskNotFound(task)
    if not VERSION_NAME.fullmatch(version):
        raise AdapterRefused(task, [f"{version!r} is no version: those are 8 hex digits"])


def to_marker(task: str, version: str) -> bytes:
    """Return what the marker of a publication says."""
    return json.dumps({"task": task, "version": version}).encode()


def from_marker(content: bytes | None) -> tuple[str | None, str | None]:
    """Return the task and version that a marker names.

    Both are None where there is none, or one that was torn: what it was to announce never began.
    """
    try:
        said = json.loads(content or b"")
        task, version = said["task"], said["version"]
        check_version(task, version)
    except (ValueError, TypeError, KeyError, TaskNotFound, AdapterRefused):
        return None, None
    return task, version
