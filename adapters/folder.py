"""One adapter folder on this machine: looked at, and read. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from adapters.contents import check_sizes, check_weights, named
from adapters.errors import VERSION_NAME, AdapterIncomplete, AdapterRefused, TaskNotFound
from adapters.localfile import is_inside, open_file, place_problem, read_bounded
from adapters.store import CONFIG, PICKLE, READ, WEIGHTS, Files, Look, limit_bytes


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
