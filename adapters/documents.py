"""Small files below a store's URL that are made once and never changed: what the catalog writes.

Two writers that make the same file find out who was first; that is all the order they need. A file
is there whole or not at all, and durable once `create` has returned. All calls block.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Protocol

from adapters.localfile import open_file, sync
from adapters.object_documents import ObjectDocuments

# What link(2) says where a file system has none: FAT, SMB, some FUSE.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
# What rename(2) says of a folder that is to replace a file, or a folder that holds something.
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}
_INSIDE = "document"
_DEAD_S = 3600.0
# As `_temporary` names those of documents, and the folders around them.
_TEMPORARY = re.compile(r"\.[0-9]+\.json\.[0-9a-f]{16}")


class Documents(Protocol):
    """Files that never change, named by paths below a store's URL."""

    def create(self, path: str, content: bytes) -> None:
        """Make a file, durably; an attempt that is repeated with the same content succeeds.

        A network repeats requests whose answers were lost, so that a writer may find its own file
        there. Whoever must know whether it was the one to make a file writes what nobody else does.

        Raises:
            FileExistsError: It is there with other content, which stays.
            OSError: It may be there now, whole, or may still come.
        """

    def read(self, path: str) -> bytes:
        """Return a file whole.

        Raises:
            FileNotFoundError: There is none.
        """

    def names(self, folder: str) -> list[str]:
        """Return the names of the files directly in a folder, none if it does not exist."""

    def delete(self, path: str) -> None:
        """Remove a file; one that is gone already is no error."""


def open_documents(url: str) -> Documents:
    """Return the documents below a directory, or a URL that fsspec knows: s3://, gs://, memory://.

    Raises:
        ImportError: It needs a package that is not installed; the message names it.
    """
    scheme, mark, path = url.partition("://")
    if not mark or scheme == "file":
        return FolderDocuments(path if mark else url)
    return ObjectDocuments(url)


class FolderDocuments:
    """Documents in a directory, which several machines may have mounted."""

    def __init__(self, root: str | Path) -> None:
        """Take the directory; it is made with the first document."""
        self.root = Path(root)
        self._ready: set[Path] = set()

    def create(self, path: str, content: bytes) -> None:
        """See `Documents.create`."""
        target = self.root / path
        self._prepare(target.parent)
        temporary = _temporary(target)
        try:
            _write(temporary, content)
            _link(temporary, target)
        except FileExistsError:
            if not self._holds(path, content):
                raise FileExistsError(errno.EEXIST, "it is there already", path) from None
        finally:
            temporary.unlink(missing_ok=True)
        sync(target.parent)

    def read(self, path: str) -> bytes:
        """See `Documents.read`."""
        target = self.root / path
        if target.is_dir() and not target.is_symlink():
            target /= _INSIDE
        # A link may lead anywhere, and a pipe would never end: neither is what we have made.
        with open_file(target, links=False) as file:
            return file.read()

    def names(self, folder: str) -> list[str]:
        """See `Documents.names`."""
        try:
            entries = os.scandir(self.root / folder)
        except FileNotFoundError:
            return []
        with entries:
            return [
                entry.name
                for entry in entries
                if not entry.name.startswith(".")
                and (entry.is_file() or os.path.isfile(f"{entry.path}/{_INSIDE}"))
            ]

    def delete(self, path: str) -> None:
        """See `Documents.delete`."""
        target = self.root / path
        try:
            target.unlink(missing_ok=True)
        except OSError:
            if not target.is_dir():
                raise
            # In one step, since a folder that is already empty could be replaced.
            gone = _temporary(target)
            with contextlib.suppress(FileNotFoundError):
                target.rename(gone)
                shutil.rmtree(gone)

    def _holds(self, path: str, content: bytes) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self.read(path) == content
        return False

    def _prepare(self, folder: Path) -> None:
        """Make a folder durably, and remove what writers that were killed have left in it."""
        if folder in self._ready:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        place = self.root
        for part in folder.relative_to(self.root).parts:
            (place / part).mkdir(exist_ok=True)
            sync(place)
            place /= part
            if place.is_symlink():
                raise OSError(errno.ELOOP, "is a link; move what it leads to here", str(place))
        with os.scandir(folder) as entries:
            for entry in entries:
                if _TEMPORARY.fullmatch(entry.name):
                    _bury(entry)
        self._ready.add(folder)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}")


def _write(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _link(temporary: Path, target: Path) -> None:
    """Give a complete file its name, unless that is taken.

    rename(2) replaces a file without a word, and a file that is made in its place with O_EXCL can
    be seen, or left by a crash, half written. Where there are no links the file goes into a folder
    of its own that is renamed: that fails on a file, and on a folder that holds something.
    """
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        folder = _temporary(target)
        folder.mkdir()
        try:
            temporary.rename(folder / _INSIDE)
            sync(folder)
            folder.rename(target)
        except OSError as failed:
            shutil.rmtree(folder)
            if failed.errno in _TAKEN:
                raise FileExistsError(*failed.args) from None
            raise


def _bury(entry: os.DirEntry[str]) -> None:
    """Remove a temporary file that is older than any writer takes."""
    with contextlib.suppress(FileNotFoundError):
        if time.time() - entry.stat(follow_symlinks=False).st_mtime < _DEAD_S:
            return
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
