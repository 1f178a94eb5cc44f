"""The disk tier between an object store and RAM: versions under a byte budget. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from stat import S_IMODE, S_ISDIR

from adapters.errors import AdapterError
from adapters.folder import read
from adapters.localfile import read_bounded, write_new
from adapters.staging import check_version
from adapters.store import MAX_JSON_BYTES, PICKLE, VERSIONED, Files, Look

logger = logging.getLogger("ray.serve")

_ENTRY = "entry.json"
_ABANDONED_S = 3600.0
# What other processes have put here is counted now and then: of the time, counting takes so much.
_COUNT_SHARE = 0.05
# Room that is made at a time, so that a full cache is not counted at every load.
_KEPT_SHARE = 0.9


def default_folder() -> Path:
    """Return where the disk cache lies unless it is configured: one folder for each user."""
    return Path(tempfile.gettempdir()) / f"onebase-{os.getuid()}"


class Disk:
    """An LRU of version folders, shared by all processes of a machine that cache one store.

    Nothing in it is trusted: each read checks the version's digest, and that of the files which
    have no part in it. What does not hold is dropped, and fetched anew by whoever asked.
    """

    def __init__(self, root: Path, url: str, max_bytes: int) -> None:
        """Take the cache's folder, the store that it is for, and the budget of all its stores.

        Raises:
            ValueError: The folder is somebody else's, or open to others.
        """
        _own(root)
        self._root = root
        self._folder = root / hashlib.sha256(url.encode()).hexdigest()[:16]
        self._max_bytes = max_bytes
        self._used_bytes = 0  # of all processes, as last counted, and of this one since
        self._next_count_s = 0.0

    def look(self, task: str, version: str) -> Look | None:
        """Return what the store's listing said of a version that is here."""
        try:
            entry = json.loads(read_bounded(self._place(task, version) / _ENTRY, MAX_JSON_BYTES))
            entries = tuple((str(n), int(size), int(mark)) for n, size, mark in entry["entries"])
            return Look(entries, float(entry["changed_s"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def read(self, task: str, version: str, look: Look | None = None) -> Files | None:
        """Return a version if it is here, whole, and what the store has.

        Args:
            task: The task.
            version: The version.
            look: What the store says of it now, None if it does not answer.
        """
        place = self._place(task, version)
        if not place.is_dir():
            return None
        kept = self.look(task, version)
        if kept is not None and look is not None and kept.entries != look.entries:
            self.forget(task, version)
            return None
        try:
            files = read(task, str(place), self._root, version)
            with suppress(OSError):  # it has just been evicted
                os.utime(place)
            if kept is not None and self._is_whole(place, files, kept):
                return files
            problem = "what was kept of it is not what was fetched"
        except AdapterError as error:
            problem = str(error)
        if place.is_dir():  # else it has just been evicted
            logger.warning(
                "adapter=%s@%s is damaged in the disk cache and is fetched again: %s",
                task, version, problem,
            )  # fmt: skip
            self.forget(task, version)
        return None

    def put(self, files: Files, look: Look) -> None:
        """Keep a version, and let the least recently used go when the budget is over.

        A version over the whole budget is not kept, nor is one that the disk has no room for.
        """
        num_bytes = sum(map(len, files.contents.values()))
        if num_bytes > self._max_bytes:
            return
        place = self._place(files.task, files.version)
        written = self._folder / f".{secrets.token_hex(8)}"
        try:
            written.mkdir(mode=0o700, parents=True)
            entry = {
                "entries": look.entries,
                "changed_s": look.changed_s,
                "rest": _digest_rest(files.contents),
            }
            for name, content in (*files.contents.items(), (_ENTRY, json.dumps(entry).encode())):
                with write_new(written / name) as file:
                    file.write(content)
            self.forget(files.task, files.version)
            written.rename(place)
        except OSError as error:
            # Another process may have been faster; whoever asked has the files either way.
            if not place.is_dir():
                logger.warning("the disk cache %s cannot be written: %s", self._root, error)
            shutil.rmtree(written, ignore_errors=True)
        self._used_bytes += num_bytes
        started_s = time.monotonic()
        if self._used_bytes > self._max_bytes or started_s >= self._next_count_s:
            self._used_bytes = self._evict()
            ended_s = time.monotonic()
            self._next_count_s = ended_s + (ended_s - started_s) / _COUNT_SHARE

    def forget(self, task: str, version: str) -> None:
        """Remove a version, if it is here."""
        _drop(self._place(task, version))

    def held(self) -> set[tuple[str, str]]:
        """Return (task, version) of all that is here of this store."""
        names = [place.name for place in _places(self._folder)]
        return {(task, version) for task, _, version in (name.partition("@") for name in names)}

    def _place(self, task: str, version: str) -> Path:
        check_version(task, version)  # it is about to be a path
        return self._folder / f"{task}@{version}"

    def _is_whole(self, place: Path, files: Files, kept: Look) -> bool:
        names = {name for name, _, _ in kept.entries} - {PICKLE}
        try:
            entry = json.loads(read_bounded(place / _ENTRY, MAX_JSON_BYTES))
            return names == files.contents.keys() and entry["rest"] == _digest_rest(files.contents)
        except (OSError, ValueError, TypeError, KeyError):
            return False

    def _evict(self) -> int:
        """Drop entries, of whatever store, the least recently used first; return what is left."""
        entries, used_bytes = [], 0
        for folder in self._root.iterdir():
            for place in _places(folder, abandoned=True):
                with suppress(OSError):  # it has just gone
                    num_bytes = sum(path.stat().st_size for path in place.iterdir())
                    entries.append((place.stat().st_mtime_ns, num_bytes, place))
                    used_bytes += num_bytes
        if used_bytes > self._max_bytes:
            for _, num_bytes, place in sorted(entries):
                if used_bytes <= _KEPT_SHARE * self._max_bytes:
                    break
                _drop(place)
                used_bytes -= num_bytes
        return used_bytes


def _own(root: Path) -> None:
    """Make a folder that nobody else can write to, or check that it is one."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        root.mkdir(mode=0o700)
    stat = root.lstat()
    if not S_ISDIR(stat.st_mode) or stat.st_uid != os.geteuid() or S_IMODE(stat.st_mode) & 0o022:
        raise ValueError(
            f"disk_cache={str(root)!r} must be a folder, no link, that belongs to this user and "
            "that nobody else can write to; name another one, or set its owner and mode"
        )


def _places(folder: Path, *, abandoned: bool = False) -> Iterator[Path]:
    """Yield the entries in a store's folder; remove, if told, what writers that died have left."""
    try:
        found = list(folder.iterdir())
    except OSError:
        return
    for place in found:
        if "@" in place.name:
            yield place
        elif abandoned and place.name.startswith("."):
            with suppress(OSError):
                if time.time() - place.stat().st_mtime > _ABANDONED_S:
                    shutil.rmtree(place)


def _drop(place: Path) -> None:
    """Remove an entry, in one step for whoever looks for it."""
    gone = place.with_name(f".{secrets.token_hex(8)}")
    with suppress(OSError):  # it is not there
        place.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _digest_rest(contents: Mapping[str, bytes]) -> str:
    """Return a digest of the files that have no part in the version."""
    hashed = hashlib.sha256()
    for name in sorted(contents.keys() - VERSIONED):
        hashed.update(f"{name}\0{len(contents[name])}\0".encode() + contents[name])
    return hashed.hexdigest()
