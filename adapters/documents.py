"""Small files below a store's URL that are made once and never changed: what the catalog writes.

Two writers that make the same file find out who was first; that is all the order they need. A file
is there whole or not at all, and durable once `create` has returned. All calls block.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

# What link(2) says where a file system has none: FAT, SMB, some FUSE.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
# What rename(2) says of a folder that is to replace a file, or a folder that holds something.
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}
_INSIDE = "document"
_DEAD_S = 3600.0
_CONFLICT_WAITS_S = (0.05, 0.2, 0.5, 1.0)
_MEMORY = threading.Lock()


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
            with self._first(path, content):
                _link(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(target.parent)

    def read(self, path: str) -> bytes:
        """See `Documents.read`."""
        target = self.root / path
        try:
            return target.read_bytes()
        except IsADirectoryError:
            return (target / _INSIDE).read_bytes()

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

    @contextlib.contextmanager
    def _first(self, path: str, content: bytes) -> Iterator[None]:
        """Let a file that is there pass if it is the one to be made."""
        try:
            yield
        except FileExistsError:
            if not _holds(self, path, content):
                raise FileExistsError(errno.EEXIST, "it is there already", path) from None

    def _prepare(self, folder: Path) -> None:
        """Make a folder durably, and remove what writers that were killed have left in it."""
        if folder in self._ready:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        place = self.root
        for part in folder.relative_to(self.root).parts:
            (place / part).mkdir(exist_ok=True)
            _sync(place)
            place /= part
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    _bury(entry)
        self._ready.add(folder)


class ObjectDocuments:
    """Documents in an object store that fsspec reaches.

    A document is one conditional PUT (`If-None-Match: *` on S3, a generation of 0 on GCS). A store
    that does not know the condition would overwrite without a word; it is found out, and refused.
    """

    def __init__(self, url: str) -> None:
        """Take the URL of the store; nothing is asked of it yet."""
        import fsspec  # Not needed for a directory.

        # Documents are small: a store that is silent for that long is away.
        patience = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 15}}
        options = patience if url.startswith("s3://") else {}
        self._files, self._root = fsspec.url_to_fs(url, use_listings_cache=False, **options)
        self._url = url
        # fsspec's memory looks whether a file is there, then makes it; threads come in between.
        self._turn = _MEMORY if url.startswith("memory://") else contextlib.nullcontext()
        self._is_fit = False

    def create(self, path: str, content: bytes) -> None:
        """See `Documents.create`."""
        if not self._is_fit:
            self._try_out(f"{path.rpartition('/')[0]}/.create-only")
        if not self._put(path, content) and not _holds(self, path, content):
            raise FileExistsError(errno.EEXIST, "it is there already", path)

    def read(self, path: str) -> bytes:
        """See `Documents.read`."""
        content: bytes = self._files.cat_file(f"{self._root}/{path}")
        return content

    def names(self, folder: str) -> list[str]:
        """See `Documents.names`."""
        try:
            found = self._files.ls(f"{self._root}/{folder}", detail=True)
        except FileNotFoundError:
            return []
        names = [one["name"].rpartition("/")[2] for one in found if one["type"] == "file"]
        return [name for name in names if name and not name.startswith(".")]

    def delete(self, path: str) -> None:
        """See `Documents.delete`."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._root}/{path}")

    def _put(self, path: str, content: bytes) -> bool:
        """Make an object; return False if there is one."""
        for wait_s in (*_CONFLICT_WAITS_S, None):
            try:
                with self._turn:
                    self._files.pipe_file(f"{self._root}/{path}", content, mode="create")
                return True
            except FileExistsError:
                return False
            except OSError as error:
                status = _http_status(error)
                if status == 412:
                    return False
                if status != 409 or wait_s is None:
                    raise
                time.sleep(wait_s)  # S3 is still busy with another writer's: ask again
        raise AssertionError("the last attempt returns or raises")

    def _try_out(self, path: str) -> None:
        if self._put(path, b"{}") and self._put(path, b"{}"):
            raise OSError(
                errno.EOPNOTSUPP,
                f"{self._url} overwrites objects in spite of If-None-Match, so that a catalog in "
                "it could lose changes; use a store that knows conditional writes",
            )
        self._is_fit = True


def _holds(documents: Documents, path: str, content: bytes) -> bool:
    try:
        return documents.read(path) == content
    except FileNotFoundError:
        return False  # it was there a moment ago


def _http_status(error: OSError) -> int | None:
    """Return the HTTP status that S3 gave as the cause of an error, None if there is none."""
    response: dict[str, Any] = getattr(error.__cause__, "response", {})
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None


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
            _sync(folder)
            folder.rename(target)
        except OSError as failed:
            shutil.rmtree(folder)
            if failed.errno in _TAKEN:
                raise FileExistsError(*failed.args) from None
            raise


def _sync(folder: Path) -> None:
    """Make what a folder lists durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # SMB: the server does as it likes
            raise
    finally:
        os.close(descriptor)


def _bury(entry: os.DirEntry[str]) -> None:
    """Remove a temporary file that is older than any writer takes."""
    with contextlib.suppress(FileNotFoundError):
        if time.time() - entry.stat(follow_symlinks=False).st_mtime < _DEAD_S:
            return
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
