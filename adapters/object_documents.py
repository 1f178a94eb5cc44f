"""Documents in an object store, as `adapters/documents.py` says what they are."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable
from typing import Any

_WAITS_S = (0.05, 0.2, 0.5, 1.0)
_MEMORY = threading.Lock()


class ObjectDocuments:
    """Documents in an object store that fsspec reaches.

    A document is one conditional PUT (`If-None-Match: *` on S3, a generation of 0 on GCS). A store
    that does not know the condition would overwrite without a word; it is found out, and refused.
    """

    def __init__(self, url: str) -> None:
        """Take the URL of the store; nothing is asked of it yet."""
        import fsspec  # Not needed for a directory.

        # Documents are small: one request each, and a store that is silent for long is away. s3fs
        # tries five times where there is no answer, and what answers with a fault is asked below.
        patience = {"connect_timeout": 3, "read_timeout": 5, "retries": {"max_attempts": 0}}
        s3 = {"max_concurrency": 1, "config_kwargs": patience}
        options = s3 if url.startswith("s3://") else {}
        self._files, self._root = fsspec.url_to_fs(url, use_listings_cache=False, **options)
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
            if _http_status(error) != 412:
                raise
            return False
        return True

    def _ask(self, call: Callable[[], Any]) -> Any:
        """Ask, and ask again while the store is at fault, or busy with another writer (409).

        Raises:
            OSError: And nothing else; what S3's client raises has other parents.
        """
        for wait_s in (*_WAITS_S, None):
            try:
                return call()
            except OSError as error:
                status = _http_status(error) or 0
                if wait_s is None or (status != 409 and status < 500):
                    raise
                time.sleep(wait_s)
            except Exception as error:
                text = f"{self._url} could not be asked: {error}"
                raise OSError(errno.EIO, text) from error
        raise AssertionError("the last attempt returns or raises")

    def _try_out(self, path: str) -> None:
        if self._put(path, b"{}") and self._put(path, b"{}"):
            raise OSError(
                errno.EOPNOTSUPP,
                f"{self._url} overwrites objects in spite of If-None-Match, so that a catalog in "
                "it could lose changes; use a store that knows conditional writes",
            )
        self._is_fit = True


def _http_status(error: OSError) -> int | None:
    """Return the HTTP status that S3 gave as the cause of an error, None if there is none."""
    response: dict[str, Any] = getattr(error.__cause__, "response", {})
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None
