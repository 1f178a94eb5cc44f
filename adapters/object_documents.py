"""Documents in an object store, as `adapters/documents.py` says what they are."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable
from typing import Any

from adapters.filesystem import Limits, ask, http_status, open_filesystem

# Documents are small: a store that is silent for long is away.
_LIMITS = Limits(connect_s=3, read_s=5, max_parts=1)
_WAITS_S = (0.05, 0.2, 0.5, 1.0)
_MEMORY = threading.Lock()


class ObjectDocuments:
    """Documents in an object store that fsspec reaches.

    A document is one conditional request: `If-None-Match: *` on S3, `ifGenerationMatch=0` on GCS.
    A store that does not know the condition would overwrite without a word; it is found out, and
    refused.
    """

    def __init__(self, url: str) -> None:
        """Take the URL of the store; nothing is asked of it yet."""
        self._files, self._root = open_filesystem(url, _LIMITS)
        self._url = url
        # fsspec's memory looks whether a file is there, then makes it; threads come in between.
        self._turn = _MEMORY if url.startswith("memory://") else contextlib.nullcontext()
        self._is_fit = False

    def create(self, path: str, content: bytes) -> None:
        """See `Documents.create`."""
        if not self._is_fit:
            self._try_out(f"{path.rpartition('/')[0]}/.create-only")
        if self._put(path, content):
            return
        with contextlib.suppress(FileNotFoundError):
            if self.read(path) == content:
                return
        raise FileExistsError(errno.EEXIST, "it is there already", path)

    def read(self, path: str) -> bytes:
        """See `Documents.read`."""
        content: bytes = self._ask(lambda: self._files.cat_file(f"{self._root}/{path}"))
        return content

    def names(self, folder: str) -> list[str]:
        """See `Documents.names`."""
        try:
            found = self._ask(lambda: self._files.ls(f"{self._root}/{folder}", detail=True))
        except FileNotFoundError:
            return []
        names = [one["name"].rpartition("/")[2] for one in found if one["type"] == "file"]
        return [name for name in names if name and not name.startswith(".")]

    def delete(self, path: str) -> None:
        """See `Documents.delete`."""
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda: self._files.rm_file(f"{self._root}/{path}"))

    def _put(self, path: str, content: bytes) -> bool:
        """Make an object; return False if there is one."""
        name = f"{self._root}/{path}"
        try:
            with self._turn:
                self._ask(lambda: self._files.pipe_file(name, content, mode="create"))
        except FileExistsError:
            return False
        except OSError as error:
            if http_status(error) != 412:
                raise
            return False
        return True

    def _ask(self, call: Callable[[], Any]) -> Any:
        """Ask, and ask again while the store is at fault.

        Raises:
            OSError: And nothing else; what the clients of stores raise has other parents.
        """
        try:
            return ask(call, _WAITS_S)
        except OSError:
            raise
        except Exception as error:
            text = f"{self._url} could not be asked: {error}"
            raise OSError(errno.EIO, text) from error

    def _try_out(self, path: str) -> None:
        if self._put(path, b"{}") and self._put(path, b"{}"):
            raise OSError(
                errno.EOPNOTSUPP,
                f"{self._url} overwrites objects that it is told to leave, so that a catalog in "
                "it could lose changes; use a store that knows conditional writes",
            )
        self._is_fit = True
