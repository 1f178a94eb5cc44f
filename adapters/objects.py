"""The objects of an object store, asked for again when the network stumbles. No torch.

All calls block. What does not answer is told after a minute or so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from adapters.errors import StoreUnreachable
from adapters.filesystem import Limits, ask, open_filesystem
from adapters.listing import names_but, pages_of

T = TypeVar("T")
_LIMITS = Limits(connect_s=5, read_s=15, max_parts=2)
_WAITS_S = (0.2, 0.6, 1.8)


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
        self._files, root = open_filesystem(url, _LIMITS)
        self._root = root.rstrip("/")
        self._url = url
        self._page = pages_of(self._files, self._root)

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

    def names_but(self, *without: str) -> dict[str, str]:
        """List all names but those in some folders; see `listing.names_but`."""
        try:
            return names_but(lambda after: self._ask(lambda: self._page(after)), without)
        except FileNotFoundError:
            raise StoreUnreachable(self._url, "there is no such bucket") from None

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
        try:
            return ask(call, _WAITS_S)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise StoreUnreachable(self._url, str(error) or repr(error)) from error


def _to_object(info: dict[str, Any]) -> Object:
    changed = info.get("LastModified") or info.get("mtime") or info.get("created") or 0.0
    changed_s = changed if isinstance(changed, int | float) else changed.timestamp()
    told = f"{info.get('ETag') or info.get('etag')} {changed_s}".encode()
    mark = int.from_bytes(hashlib.sha256(told).digest()[:6])  # JSON's numbers have 53 bits
    return Object(int(info["size"]), mark, float(changed_s))
