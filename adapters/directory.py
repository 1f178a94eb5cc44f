"""A store that is a directory. No torch.

Whoever writes the store may link within it; what a link has outside of it is never opened.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from adapters.contents import nothing_more_comes
from adapters.errors import (
    TASK_NAME,
    VERSION_NAME,
    AdapterChanged,
    AdapterError,
    AdapterIncomplete,
    AdapterRefused,
    StoreUnreachable,
    TaskNotFound,
    VersionNotFound,
)
from adapters.folder import Marked, look, mark, read, version_names, youngest_s
from adapters.localfile import is_inside, link_or_copy, place_problem, read_bounded, sync, write_new
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


class Directory:
    """A directory of PEFT folders, one a task, and of versions below them.

    What its calls promise is said in `adapters.store.Store`; they block on the disk.
    """

    def __init__(self, root: str | Path) -> None:
        """Take the directory; it may be empty, and need not exist yet."""
        self.root = Path(root)
        self.url = str(root)
        self._marked: dict[str, Marked] = {}

    def tasks(self) -> list[str]:
        """Return the names of all tasks that have a plain folder or a version, sorted."""
        try:
            entries = os.scandir(self.root)
        except (FileNotFoundError, NotADirectoryError):
            return []
        with entries:
            names = [entry.name for entry in entries if TASK_NAME.fullmatch(entry.name)]
        return sorted(name for name in names if self._is_task(name))

    def folders(self) -> dict[str, int]:
        """Return the folder of every possible task -> a mark."""
        last, self._marked = self._marked, {}
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root) as entries:
            for entry in entries:
                if TASK_NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    with suppress(OSError):  # it has just gone
                        mtime_ns = entry.stat().st_mtime_ns
                        seen = mark(entry.path, mtime_ns, last.get(entry.name))
                        self._marked[entry.name] = seen
        return {task: seen.mark for task, seen in self._marked.items()}

    def versions(self, task: str) -> list[str]:
        """Return the names of a task's version folders, the oldest change first."""
        folder = self._folder(task)
        changes = []
        for version in version_names(folder):
            with suppress(OSError):  # it has just gone
                changes.append((os.stat(f"{folder}/{version}").st_mtime_ns, version))
        return [version for _, version in sorted(changes)]

    def look(self, task: str, version: str | None = None) -> Look:
        """Return what `stat` says of the folder that `read` would read."""
        return look(task, self._find(task, version), self.root)

    def read(self, task: str, version: str | None = None) -> Files:
        """Read a task's plain folder whole, or one version."""
        folder = self._find(task, version)
        if folder != self._folder(task):
            return read(task, folder, self.root, version)
        files = read(task, folder, self.root)
        if version is not None and files.version != version:
            raise AdapterChanged(task, version, files.version)
        return files

    def read_file(self, task: str, version: str | None, name: str, max_bytes: int) -> bytes | None:
        """Read one file of a version folder, or of the plain one; None if it is not there."""
        check_names([name])
        if version is not None:
            check_version(task, version)
        folder = self._folder(task) if version is None else f"{self._folder(task)}/{version}"
        path, root = f"{folder}/{name}", os.path.realpath(self.root)
        try:
            mode = os.stat(path).st_mode
            problems = place_problem(path, mode, root, is_inside(os.path.realpath(folder), root))
            content = b"" if problems else read_bounded(path, max_bytes)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise AdapterIncomplete(task, f"{name} cannot be read ({error.strerror})") from None
        if len(content) > max_bytes:
            problems = [f"{name} is over the limit of {max_bytes} bytes"]
        if problems:
            raise AdapterRefused(task, problems)
        return content

    def stage(self, files: Mapping[str, BinaryIO]) -> str:
        """Take files in, for nobody to see yet; on any error nothing of them is left."""
        check_names(files)
        staging = secrets.token_hex(16)
        with self._writing():
            try:
                folder = self._new(staging) / FILES
                folder.mkdir()
                for name, source in files.items():
                    with write_new(folder / name) as target:
                        copy_bounded(name, source, target)
            except BaseException:
                self.discard(staging)
                raise
        return staging

    def read_staged(self, staging: str, task: str) -> Files:
        """Read what was staged, as `read` would if it were a version of the task."""
        self._folder(task)
        place = self._staged(staging)
        if place is None or not (place / FILES).is_dir():
            raise not_there(task)
        with nothing_more_comes(task):
            return read(task, f"{place}/{FILES}", self.root)

    def publish(self, staging: str, task: str, version: str) -> bool:
        """Make what was staged a version, at once and whole; durable when this returns."""
        check_version(task, version)
        folder = self._own_folder(task)
        found = self.read_staged(staging, task).version
        if found != version:
            raise AdapterRefused(task, [f"what was uploaded is {found}, not {version}"])
        if self._holds(task, version):
            return False
        place = self.root / FOLDER / staging
        with self._writing():
            with open(place / MARKER, "wb") as marker:
                marker.write(to_marker(task, version))
            linked = place / secrets.token_hex(4)
            shutil.copytree(place / FILES, linked, copy_function=link_or_copy)
            staged = (*linked.iterdir(), linked, place / MARKER, place)
            for path in (*staged, place.parent, self.root):
                sync(path)
            folder.mkdir(exist_ok=True)
            try:
                if os.path.lexists(folder / version):
                    (folder / version).rename(place / f"not-{linked.name}")
                linked.rename(folder / version)
            except BaseException:
                with suppress(OSError):  # it is not empty
                    folder.rmdir()
                raise
            sync(folder)
            sync(self.root)
        return True

    def discard(self, staging: str) -> None:
        """Remove a staging and its marker, if it is there."""
        place = self._staged(staging)
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)

    def unfinished(self, quiet_s: float = 0.0) -> list[tuple[str, str | None, str | None]]:
        """Return the stagings that there are, or those in which nothing changed for so long."""
        found = []
        before_s = time.time() - quiet_s if quiet_s else math.inf
        for staging in sorted(os.listdir(self.root / FOLDER)) if self._has_stagings() else ():
            place = self._staged(staging)
            if place is None or youngest_s(place) > before_s:
                continue
            content = None
            with suppress(OSError):
                content = read_bounded(place / MARKER, MAX_MARKER_BYTES)
            found.append((staging, *from_marker(content)))
        return found

    def remove(self, task: str, version: str | None) -> None:
        """Remove a version folder, or with None the plain folder's files, if they are there."""
        folder = Path(self._folder(task))
        with self._writing():
            if version is not None:
                check_version(task, version)
                self._remove_version(self._own_folder(task), version)
            elif folder.is_symlink():
                folder.unlink()
            else:
                # Without its config it is no task any more, so that goes first.
                for name in (*READ, PICKLE):
                    with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                        (folder / name).unlink()
            with suppress(OSError):  # it is not there, or not empty
                sync(folder)
                folder.rmdir()
            with suppress(FileNotFoundError):
                sync(self.root)

    def forget(self, task: str, version: str) -> None:
        """Do nothing: what is on this machine needs no cache."""

    def on_disk(self) -> set[tuple[str, str]]:
        """Return nothing: what is on this machine needs no cache."""
        return set()

    def _folder(self, task: str) -> str:
        if not TASK_NAME.fullmatch(task):
            raise TaskNotFound(task)
        return f"{self.root}/{task}"

    def _own_folder(self, task: str) -> Path:
        """Return a task's folder to write in: a link's versions would be another task's as well."""
        folder = Path(self._folder(task))
        if folder.is_symlink():
            raise AdapterRefused(
                task, ["its folder is a link; put a folder in its place, to keep versions in it"]
            )
        return folder

    def _is_task(self, name: str) -> bool:
        # False for a folder that we may not read, too.
        folder = f"{self.root}/{name}"
        return os.path.isfile(f"{folder}/{CONFIG}") or any(version_names(folder))

    def _find(self, task: str, version: str | None) -> str:
        """Return the folder that has a version, the plain one if no other does."""
        plain = self._folder(task)
        if version is None:
            return plain
        if VERSION_NAME.fullmatch(version) and os.path.isfile(f"{plain}/{version}/{CONFIG}"):
            return f"{plain}/{version}"
        if not os.path.isfile(f"{plain}/{CONFIG}") and any(version_names(plain)):
            raise VersionNotFound(task, version)
        return plain

    def _holds(self, task: str, version: str) -> bool:
        folder = f"{self._folder(task)}/{version}"
        try:
            return bool(read(task, folder, self.root, version)) and not os.path.islink(folder)
        except AdapterError:
            return False

    def _remove_version(self, folder: Path, version: str) -> None:
        """Move a version away at once and whole, then remove it."""
        if (folder / version).is_symlink():
            (folder / version).unlink()
        elif (folder / version).exists():
            trash = secrets.token_hex(16)
            (folder / version).rename(self._new(trash) / FILES)
            sync(folder)
            self.discard(trash)

    def _new(self, staging: str) -> Path:
        place = self.root / FOLDER / staging
        if place.parent.is_symlink():
            raise StoreUnreachable(self.url, f"{FOLDER} is a link; make it a folder")
        place.mkdir(parents=True)
        return place

    def _has_stagings(self) -> bool:
        return (self.root / FOLDER).is_dir() and not (self.root / FOLDER).is_symlink()

    def _staged(self, staging: str) -> Path | None:
        """Return the folder of a staging, None if there is none."""
        place = self.root / FOLDER / staging
        known = STAGING_NAME.fullmatch(staging) and self._has_stagings()
        return place if known and place.is_dir() and not place.is_symlink() else None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            name = Path(error.filename or self.root).name
            raise StoreUnreachable(
                self.url, f"{name} cannot be written ({error.strerror})"
            ) from None
