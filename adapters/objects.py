"""The objects of an object store, asked for again when the network stumbles. No torch.

All calls block: fsspec's async file systems work in a thread of their own, which is waited for.
What does not answer is told after a minute or so.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from adapters.errors import StoreUnreachable

T = TypeVar("T")
_WAITS_S = (0.2, 0.6, 1.8)
# s3fs and botocore would each try five times in every try of ours.
_S3 = {
    "max_concurrency": 2,  # parts of 50 MiB in RAM at a time
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 15,
        "retries": {"total_max_attempts": 1},
    },
}


@dataclass(frozen=True, slots=True)
class Object:
    """An object as a listing shows it.

    Attributes:
        num_bytes: Its size.
        mark: A number made of its etag and time: another one for another content.
        changed_s: When it was written, in seconds since the epoch.
    """

    num_bytes: int
    mark: int
    changed_s: float


class Objects:
    """What lies below a URL. All calls block; all raise StoreUnreachable after a few tries."""

    def __init__(self, url: str) -> None:
        """Take the URL; nothing is asked of it yet."""
        import fsspec  # not needed for a directory

        is_s3 = url.startswith("s3://")
        # An instance of our own: others in this process may have other options.
        self._files, root = fsspec.url_to_fs(
            url, use_listings_cache=False, skip_instance_cache=True, **(_S3 if is_s3 else {})
        )
        if is_s3:
            self._files.retries = 1
        self._root = root.rstrip("/")
        self._url = url

    def below(self, prefix: str) -> dict[str, Object]:
        """List what begins with a prefix, as it is now: name after the prefix -> object."""
        begin = f"{self._root}/{prefix}"
        found: dict[str, dict[str, Any]]
        try:
            found = self._ask(lambda: self._files.find(self._root, prefix=prefix, detail=True))
        except FileNotFoundError:
            raise StoreUnreachable(self._url, "there is no such bucket") from None
        return {
            name[len(begin) :]: _to_object(info)
            for name, info in found.items()
            if name.startswith(begin)  # memory:// lists all
        }

    def fetch(self, name: str, num_bytes: int) -> bytes:
        """Return an object that a listing showed with so many bytes; no more are ever fetched.

        Raises:
            FileNotFoundError: It is gone.
        """
        if num_bytes == 0:
            return b""

        def fetch() -> bytes:
            content: bytes = self._files.cat_file(f"{self._root}/{name}", start=0, end=num_bytes)
            if len(content) != num_bytes:
                raise OSError(f"{name} came with {len(content)} of {num_bytes} bytes")
            return content

        return self._ask(fetch)

    def put(self, name: str, path: Path) -> None:
        """Write an object, from a local file."""
        self._ask(lambda: self._files.put_file(str(path), f"{self._root}/{name}"))

    def put_bytes(self, name: str, content: bytes) -> None:
        """Write a small object."""
        self._ask(lambda: self._files.pipe_file(f"{self._root}/{name}", content))

    def copy(self, name: str, to: str) -> None:
        """Copy an object, within the store."""
        self._ask(lambda: self._files.cp_file(f"{self._root}/{name}", f"{self._root}/{to}"))

    def delete(self, name: str) -> None:
        """Remove an object; one that is gone already is no error."""
        with suppress(FileNotFoundError):
            self._ask(lambda: self._files.rm_file(f"{self._root}/{name}"))

    def _ask(self, call: Callable[[], T]) -> T:
        for wait_s in (*_WAITS_S, None):
            try:
                return call()
            except FileNotFoundError:
                raise
            except PermissionError as error:
                raise StoreUnreachable(self._url, str(error)) from None
            except Exception as error:
                # Whatever package it is of: a 500, a timeout, a body that ended early.
                if wait_s is None:
                    raise StoreUnreachable(self._url, str(error) or repr(error)) from error
                # Replicas that start together must not come back together.
                time.sleep(wait_s * random.uniform(0.5, 1.5))
        raise AssertionError("the last try returns or raises")


def _to_object(info: dict[str, Any]) -> Object:
    changed = info.get("LastModified") or info.get("mtime") or info.get("created") or 0.0
    changed_s = changed if isinstance(changed, int | float) else changed.timestamp()
    told = f"{info.get('ETag') or info.get('etag')} {changed_s}".encode()
    mark = int.from_bytes(hashlib.sha256(told).digest()[:6])  # JSON's numbers have 53 bits
    return Object(int(info["size"]), mark, float(changed_s))
