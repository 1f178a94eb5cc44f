"""A store that is an object store: S3, Google Cloud Storage, or this process's memory. No torch."""

from __future__ import annotations

import logging
import math
import secrets
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from adapters.contents import nothing_more_comes
from adapters.disk import Disk
from adapters.errors import (
    TASK_NAME,
    AdapterChanged,
    AdapterError,
    AdapterIncomplete,
    AdapterRefused,
    StoreUnreachable,
    TaskNotFound,
    VersionNotFound,
)
from adapters.objects import Object, Objects
from adapters.prefix import Prefix, blaming, version_names
from adapters.staging import (
    FILES,
    FOLDER,
    MARKER,
    MAX_MARKER_BYTES,
    STAGING_NAME,
    check_names,
    check_version,
    copy_bounded,
    from_marker,
    not_there,
    to_marker,
)
from adapters.store import CONFIG, PICKLE, READ, Files, Look

logger = logging.getLogger("ray.serve")

# The catalog keeps all of its history.
_NO_TASKS = (f"{FOLDER}/", "catalog/")


class Bucket:
    """PEFT folders and versions below a URL, with a disk cache of versions before it.

    What its calls promise is said in `adapters.store.Store`; they block on the network. A listing
    is always a new one. Without one, a version that the disk cache holds is read all the same.
    """

    def __init__(self, url: str, disk: Disk) -> None:
        """Take the URL and the disk cache; nothing is asked of the store yet."""
        self.url = url
        self._objects = Objects(url)
        self._disk = disk

    def tasks(self) -> list[str]:
        """Return the names of all tasks that have a plain folder or a version, sorted."""
        names = set()
        for path in self._objects.names_but(*_NO_TASKS):
            task, _, name = path.partition("/")
            if TASK_NAME.fullmatch(task) and (name == CONFIG or version_names([name])):
                names.add(task)
        return sorted(names)

    def folders(self) -> dict[str, int]:
        """Return the folder of every possible task -> a mark."""
        found: dict[str, list[tuple[str, str]]] = {}
        for path, mark in self._objects.names_but(*_NO_TASKS).items():
            task, _, name = path.partition("/")
            if name and TASK_NAME.fullmatch(task):
                found.setdefault(task, []).append((name, mark))
        return {task: hash(tuple(sorted(objects))) for task, objects in found.items()}

    def versions(self, task: str) -> list[str]:
        """Return the names of a task's version folders, the oldest change first."""
        below = self._list(task)
        changed_s = {name: below[f"{name}/{CONFIG}"].changed_s for name in version_names(below)}
        return sorted(changed_s, key=lambda name: (changed_s[name], name))

    def look(self, task: str, version: str | None = None) -> Look:
        """Return what a listing says of the folder that `read` would read."""
        try:
            return self._find(task, version).look
        except AdapterIncomplete:
            kept = None if version is None else self._disk.look(task, version)
            if kept is None:
                raise
            return kept

    def read(self, task: str, version: str | None = None) -> Files:
        """Read a task's plain folder whole, or one version."""
        try:
            found = self._find(task, version)
        except AdapterIncomplete as error:
            kept = None if version is None else self._disk.read(task, version)
            if kept is None:
                raise
            logger.warning("adapter=%s@%s is read from the disk cache: %s", task, version, error)
            return kept
        if version is None or found.path == f"{task}/":
            files = found.read(task, self._objects)
            if self._find(task, None).look.entries != found.look.entries:
                raise AdapterIncomplete(task, "its folder changed while it was read")
            if version not in (None, files.version):
                raise AdapterChanged(task, str(version), files.version)
            return files
        kept = self._disk.read(task, version, found.look)
        if kept is None:
            kept = found.read(task, self._objects, version)
            self._disk.put(kept, found.look)
        return kept

    def read_file(self, task: str, version: str | None, name: str, max_bytes: int) -> bytes | None:
        """Read one file of a version folder, or of the plain one; None if it is not there."""
        check_names([name])
        if version is not None:
            check_version(task, version)
        path = f"{self._prefix(task, version)}{name}"
        with blaming(task):
            one = self._objects.below(path).get("")
            if one is None:
                return None
            if one.num_bytes > max_bytes:
                raise AdapterRefused(task, [f"{name} is over the limit of {max_bytes} bytes"])
            return self._objects.fetch(path, one.num_bytes)

    def stage(self, files: Mapping[str, BinaryIO]) -> str:
        """Take files in, for nobody to see yet; on any error nothing of them is left."""
        check_names(files)
        staging = secrets.token_hex(16)
        try:
            for name, source in files.items():
                # Whole and within its limit here first: what an object store is given, it keeps.
                with tempfile.NamedTemporaryFile(prefix="onebase-") as spooled:
                    copy_bounded(name, source, spooled.file)
                    spooled.flush()
                    self._objects.put(f"{FOLDER}/{staging}/{FILES}/{name}", Path(spooled.name))
        except BaseException:
            with suppress(StoreUnreachable):
                self.discard(staging)
            raise
        return staging

    def read_staged(self, staging: str, task: str) -> Files:
        """Read what was staged, as `read` would if it were a version of the task."""
        self._prefix(task, None)
        with nothing_more_comes(task):
            return self._staged(staging, task).read(task, self._objects)

    def publish(self, staging: str, task: str, version: str) -> bool:
        """Make what was staged a version, at once and whole; durable when this returns."""
        check_version(task, version)
        staged, prefix = self._staged(staging, task), self._prefix(task, version)
        found = self.read_staged(staging, task).version
        if found != version:
            raise AdapterRefused(task, [f"what was uploaded is {found}, not {version}"])
        if self._holds(task, version):
            return False
        self._objects.put_bytes(f"{FOLDER}/{staging}/{MARKER}", to_marker(task, version))
        self._clear(prefix)
        try:
            # Without its config it does not exist, so that comes last.
            for name in sorted(staged.objects, key=lambda name: name == CONFIG):
                self._objects.copy(f"{staged.path}{name}", f"{prefix}{name}")
        except FileNotFoundError:
            self._clear(prefix)
            raise not_there(task) from None
        except BaseException:
            with suppress(StoreUnreachable):
                self._clear(prefix)
            raise
        return True

    def discard(self, staging: str) -> None:
        """Remove a staging and its marker, if it is there."""
        if STAGING_NAME.fullmatch(staging):
            self._clear(f"{FOLDER}/{staging}/{FILES}/")
            self._objects.delete(f"{FOLDER}/{staging}/{MARKER}")

    def unfinished(self, quiet_s: float = 0.0) -> list[tuple[str, str | None, str | None]]:
        """Return the stagings that there are, or those in which nothing changed for so long."""
        stagings: dict[str, dict[str, Object]] = {}
        for path, one in self._objects.below(f"{FOLDER}/").items():
            staging, _, name = path.partition("/")
            if STAGING_NAME.fullmatch(staging):
                stagings.setdefault(staging, {})[name] = one
        before_s = time.time() - quiet_s if quiet_s else math.inf
        return [
            (staging, *self._marked(staging, objects.get(MARKER)))
            for staging, objects in sorted(stagings.items())
            if max(one.changed_s for one in objects.values()) <= before_s
        ]

    def remove(self, task: str, version: str | None) -> None:
        """Remove a version folder, or with None the plain folder's files, if they are there."""
        if version is not None:
            check_version(task, version)
            self._clear(self._prefix(task, version))
            self.forget(task, version)
            return
        below = self._list(task)
        for name in (*READ, PICKLE):  # without its config it is no task any more: first
            if name in below:
                self._objects.delete(f"{task}/{name}")

    def forget(self, task: str, version: str) -> None:
        """Remove a version from this machine's disk cache."""
        check_version(task, version)
        self._disk.forget(task, version)

    def on_disk(self) -> set[tuple[str, str]]:
        """Return (task, version) of all that this machine's disk cache holds."""
        return self._disk.held()

    def _prefix(self, task: str, version: str | None) -> str:
        if not TASK_NAME.fullmatch(task):
            raise TaskNotFound(task)
        return f"{task}/" if version is None else f"{task}/{version}/"

    def _list(self, task: str) -> dict[str, Object]:
        with blaming(task):
            return self._objects.below(self._prefix(task, None))

    def _find(self, task: str, version: str | None) -> Prefix:
        """Return the folder that has a version, the plain one if no other does; in one listing."""
        below = self._list(task)
        versions = [] if version is None else version_names(below)
        if version in versions:
            return Prefix.of(f"{task}/", below, f"{version}/")
        if CONFIG in below:
            return Prefix.of(f"{task}/", below)
        raise VersionNotFound(task, str(version)) if versions else TaskNotFound(task)

    def _staged(self, staging: str, task: str) -> Prefix:
        path = f"{FOLDER}/{staging}/{FILES}/"
        if not STAGING_NAME.fullmatch(staging) or not (below := self._objects.below(path)):
            raise not_there(task)
        return Prefix.of(path, below)

    def _holds(self, task: str, version: str) -> bool:
        try:
            found = self._find(task, version)
            return found.path != f"{task}/" and bool(found.read(task, self._objects, version))
        except AdapterError as error:
            if isinstance(error.__cause__, StoreUnreachable):
                raise error.__cause__ from None
            return False

    def _marked(self, staging: str, marker: Object | None) -> tuple[str | None, str | None]:
        if marker is None or marker.num_bytes > MAX_MARKER_BYTES:
            return None, None
        with suppress(FileNotFoundError):
            content = self._objects.fetch(f"{FOLDER}/{staging}/{MARKER}", marker.num_bytes)
            return from_marker(content)
        return None, None

    def _clear(self, prefix: str) -> None:
        """Remove a folder, its config first: without it a version does not exist."""
        for name in sorted(self._objects.below(prefix), key=lambda name: (name != CONFIG, name)):
            self._objects.delete(f"{prefix}{name}")
