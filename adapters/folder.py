"""One adapter folder on this machine: looked at, and read. No torch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from adapters.contents import check_sizes, check_weights, named
from adapters.errors import VERSION_NAME, AdapterIncomplete, AdapterRefused, TaskNotFound
from adapters.localfile import is_inside, open_file, place_problem, read_bounded
from adapters.store import CONFIG, PICKLE, READ, WEIGHTS, Files, Look, limit_bytes

_MARKED = frozenset((*READ, PICKLE))
# Longer than the step in which any file system tells times.
_YOUNG_NS = 5 * 10**9


def look(task: str, folder: str, root: str | Path) -> Look:
    """Return what `stat` says of a folder.

    Args:
        task: Whose folder it is.
        folder: Its path.
        root: Where all that it holds must lie.

    Raises:
        TaskNotFound: It has no adapter_config.json.
        AdapterRefused: Something in it is no file, or lies outside the root.
    """
    root, problems = os.path.realpath(root), list[str]()
    inside = is_inside(os.path.realpath(folder), root)
    entries, changed_s = [], 0.0
    # Strings, not Paths, of which this would make dozens with every request in need of a look.
    for name in (*READ, PICKLE):
        path = f"{folder}/{name}"
        try:
            stat = os.stat(path)
        except OSError:
            continue
        if name != PICKLE:
            problems += place_problem(path, stat.st_mode, root, inside)
        entries.append((name, stat.st_size, stat.st_mtime_ns))
        # A copy that keeps the times of its files still moves the change time.
        changed_s = max(changed_s, stat.st_mtime, stat.st_ctime)
    if problems:
        raise AdapterRefused(task, problems)
    if not any(name == CONFIG for name, _, _ in entries):
        raise TaskNotFound(task)
    return Look(tuple(sorted(entries)), changed_s)


def read(task: str, folder: str, root: str | Path, version: str | None = None) -> Files:
    """Read a folder whole.

    Args:
        task: Whose folder it is.
        folder: Its path.
        root: Where all that it holds must lie.
        version: What it must hold, None for anything.

    Raises:
        TaskNotFound: As `look`.
        AdapterIncomplete: Its weights are not there yet, or not all; or a file cannot be read.
        AdapterRefused: As `look`; it has only a pickle, or a file of absurd size; or it is not
            `version`.
    """
    before = look(task, folder, root)
    sizes = {name: size for name, size, _ in before.entries}
    check_sizes(task, sizes)
    try:
        with open_file(f"{folder}/{WEIGHTS}") as file:
            check_weights(task, file, os.fstat(file.fileno()).st_size)
        contents = {
            name: read_bounded(f"{folder}/{name}", limit_bytes(name))
            for name in READ
            if name in sizes
        }
    except OSError as error:
        name = Path(error.filename or WEIGHTS).name
        raise AdapterIncomplete(task, f"{name} cannot be read ({error.strerror})") from None
    if look(task, folder, root).entries != before.entries:
        raise AdapterIncomplete(task, "its folder changed while it was read")
    return named(task, contents, version)


class Marked(NamedTuple):
    """A folder as a scan has seen it.

    Attributes:
        mark: A number; another one says that something in the folder may have changed.
        mtime_ns: The folder's, which is another one when a name comes or goes.
        names: Of the files and version folders in it that count; None while it is so young that a
            name may still come without another time.
    """

    mark: int
    mtime_ns: int
    names: Sequence[str] | None


def mark(folder: str, mtime_ns: int, last: Marked | None) -> Marked:
    """Look at a task's folder by as few calls as can be: a scan does this for thousands.

    Args:
        folder: Its path.
        mtime_ns: Its own time.
        last: What the last scan saw.

    Raises:
        OSError: It has just gone.
    """
    names = last.names if last is not None and last.mtime_ns == mtime_ns else None
    is_known = names is not None
    if names is None:
        names = [
            name for name in os.listdir(folder) if name in _MARKED or VERSION_NAME.fullmatch(name)
        ]
    told: list[tuple[int, int, int] | None] = []
    for name in names:
        try:
            # A version folder's own time is another one with each file that comes into it.
            stat = os.stat(f"{folder}/{name}")
        except OSError:
            told.append(None)
        else:
            told.append((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    is_old = is_known or mtime_ns < time.time_ns() - _YOUNG_NS
    return Marked(hash((mtime_ns, *told)), mtime_ns, names if is_old else None)


def version_names(folder: str) -> Iterator[str]:
    """Yield the names of the version folders in a folder."""
    try:
        entries = os.scandir(folder)
    except OSError:
        return
    with entries:
        for entry in entries:
            if VERSION_NAME.fullmatch(entry.name) and os.path.isfile(f"{entry.path}/{CONFIG}"):
                yield entry.name


def youngest_s(folder: Path) -> float:
    """Return when anything in a folder last changed, in seconds since the epoch."""
    changed_s, paths = 0.0, [folder]
    with suppress(FileNotFoundError):  # a folder has just gone
        paths += folder.rglob("*")
    for path in paths:
        with suppress(OSError):  # so has this
            changed_s = max(changed_s, path.lstat().st_mtime)
    return changed_s
