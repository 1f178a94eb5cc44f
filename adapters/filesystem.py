"""The file systems of object stores: how they are opened, and how often they are asked. No torch.

All calls block: fsspec's async file systems work in a thread of their own, which is waited for.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
# What is worth asking again: a store that is slow, busy with another writer, or asked too much.
_PASSING = (408, 409, 429)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may take.

    Attributes:
        connect_s: Until the store takes the connection.
        read_s: From one piece of its answer to the next.
        max_parts: Parts of one object that are on their way at a time, each 50 MiB of RAM at most.
            S3's client asks for the size of what it would read in parts.
    """

    connect_s: float
    read_s: float
    max_parts: int


def open_filesystem(url: str, limits: Limits | None = None) -> tuple[Any, str]:
    """Return an fsspec file system of our own, that caches no listing, and a URL's path in it.

    Args:
        url: s3://, gs:// or memory://.
        limits: With these each request is sent once, for `ask` to send again. With None it is
            repeated as the scheme's package sees fit: for minutes.
    """
    import fsspec  # not needed for a directory

    scheme, _, path = url.partition("://")
    # Others in this process may have other options.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "gs":
        # What gcsfs has registered would ask over gRPC what kind of bucket this is, with every
        # object where the account may not know: it is for zonal buckets, which this leaves out.
        from gcsfs.core import GCSFileSystem

        if limits is None:
            return GCSFileSystem(**options), path
        return _open_gs(GCSFileSystem, limits, options), path
    if scheme == "s3" and limits is not None:
        options["max_concurrency"] = limits.max_parts
        options["config_kwargs"] = {
            "connect_timeout": limits.connect_s,
            "read_timeout": limits.read_s,
            "retries": {"total_max_attempts": 1},
        }
    files, path = fsspec.url_to_fs(url, **options)
    if scheme == "s3" and limits is not None:
        files.retries = 1
    return files, path


def _open_gs(gcs: Any, limits: Limits, options: dict[str, Any]) -> Any:
    from aiohttp import ClientTimeout

    class Once(gcs):  # type: ignore[misc]
        """Google Cloud Storage, each request sent once: gcsfs has six tries, a constant."""

        async def _request(self, *args: Any, **kwargs: Any) -> Any:
            return await gcs._request.__wrapped__(self, *args, **kwargs)

    timeout = ClientTimeout(sock_connect=limits.connect_s, sock_read=limits.read_s)
    return Once(requests_timeout=timeout, **options)


def ask(call: Callable[[], T], waits_s: Sequence[float]) -> T:
    """Call, and again after each of the waits, in seconds, while the store or the network fails.

    Raises:
        FileNotFoundError, FileExistsError, PermissionError: The store says so, and was not asked
            again.
        Exception: Of whatever package it is: the last failure, or one that is no use repeating.
    """
    for wait_s in waits_s:
        try:
            return call()
        except (FileNotFoundError, FileExistsError, PermissionError):
            raise
        except Exception as error:
            # Without a status it is a timeout, a connection that was cut, a body that ended early.
            status = http_status(error)
            if status is not None and status < 500 and status not in _PASSING:
                raise
        # Replicas that start together must not come back together.
        time.sleep(wait_s * random.uniform(0.5, 1.5))
    return call()


def http_status(error: Exception) -> int | None:
    """Return the HTTP status that a store has answered with, None if an error does not tell."""
    status = getattr(error, "code", None)  # of Google Cloud Storage
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):  # of S3
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None
