"""Versions out of other places: what the configuration allows, copied into the store's staging."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from stat import S_ISREG
from typing import Any

import fsspec

from adapters.errors import AdapterError
from adapters.store import CONFIG, READ, Store
from deployments.errors import BadInput, Forbidden, NotReady, RequestError
from deployments.ingress.hub import Hub
from deployments.ingress.remote import CHUNK_BYTES, Allowance, Download, RemoteFile
from deployments.source import Source, is_allowed

logger = logging.getLogger("ray.serve")

_MAX_FETCH_S = 900.0


class Sources:
    """Fetches what `allowed_sources` names."""

    def __init__(self, allowed: Sequence[str], store: Store, *, max_bytes: int) -> None:
        """Take the prefixes of sources that are allowed, and the most bytes to take from one."""
        self._allowed = [Source.parse_prefix(prefix) for prefix in allowed]
        self._store = store
        self._max_bytes = max_bytes
        self._hub = Hub() if any(prefix.scheme == "hf" for prefix in self._allowed) else None

    def stage(self, name: str) -> tuple[str, str]:
        """Copy a source's files into staging. Blocks as long as that takes.

        Returns:
            The staging, and the source by which it can be told again: a hub's by its commit.

        Raises:
            BadInput: The name is none, or there is no adapter there.
            Forbidden: The configuration does not allow it.
            TooLarge, StagingTooLarge: It is over a limit.
            NotReady: It cannot be reached.
        """
        try:
            source = Source.parse(name)
        except ValueError as error:
            raise BadInput(str(error)) from None
        self._check(source, source)
        allowance = Allowance(self._max_bytes, _MAX_FETCH_S)
        with ExitStack() as stack:
            try:
                found, files = self._find(source, stack)
                if CONFIG not in (file.name for file in files):
                    raise BadInput(f"{source} holds no adapter: it has no {CONFIG}")
                # Before anything is fetched, so of a copy: what comes is counted as it comes.
                Allowance(self._max_bytes, _MAX_FETCH_S).take(
                    sum(file.num_bytes or 0 for file in files)
                )
            except Exception as error:
                raise _told(source, error) from error
            staging = self._store.stage(
                {
                    file.name: stack.enter_context(
                        io.BufferedReader(Download(_telling(source, file), allowance), CHUNK_BYTES)
                    )
                    for file in files
                }
            )
        return staging, str(found)

    def _find(self, source: Source, stack: ExitStack) -> tuple[Source, list[RemoteFile]]:
        """Return the source's full name, and its files; what they keep open ends with the stack."""
        if source.scheme == "file":
            return source, self._find_local(source, stack)
        if source.scheme != "hf":
            return source, _find_objects(source)
        assert self._hub is not None  # one of the prefixes was the hub's
        found, files = self._hub.find(source, READ)
        if found.repository != source.repository:
            moved = source.path.replace(source.repository, found.repository, 1)
            self._check(Source("hf", moved), source)
        return found, files

    def _check(self, source: Source, asked: Source) -> None:
        if not is_allowed(source, self._allowed):
            said = "" if source == asked else f" is now {source}, which"
            raise Forbidden(
                f"{asked}{said} is not in allowed_sources; whoever runs the server may add it"
            )

    def _find_local(self, source: Source, stack: ExitStack) -> list[RemoteFile]:
        """Open a folder's files, and look at what was opened: a path may lead elsewhere by now."""
        folder = os.path.realpath(source.path)
        roots = [
            os.path.realpath(prefix.path or "/")
            for prefix in self._allowed
            if source.begins_with(prefix)
        ]
        files = []
        for name in READ:
            path = os.path.join(folder, name)
            outside = Forbidden(f"{name} of {source} lies outside of allowed_sources, by a link")
            # Before it is opened too, so that nobody learns what there is and what is not.
            if not _is_below(os.path.realpath(path), roots):
                raise outside
            try:
                found = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            stack.callback(os.close, found)
            if not _is_below(os.readlink(f"/proc/self/fd/{found}"), roots):
                raise outside
            stat = os.fstat(found)
            if not S_ISREG(stat.st_mode):
                raise BadInput(f"{name} of {source} is not a file")
            files.append(RemoteFile(name, stat.st_size, partial(_read, found)))
        return files


def _is_below(path: str, roots: Sequence[str]) -> bool:
    return any(os.path.commonpath((path, root)) == root for root in roots)


def _find_objects(source: Source) -> list[RemoteFile]:
    """Ask an object store for the files that an adapter may have, whatever else lies there."""
    system = fsspec.filesystem(source.scheme, use_listings_cache=False)
    with ThreadPoolExecutor(len(READ)) as threads:
        asked = threads.map(partial(_size, system), [f"{source.path}/{name}" for name in READ])
        sizes = dict(zip(READ, asked, strict=True))
    if not any(size is not None for size in sizes.values()):
        system.info(source.path)  # FileNotFoundError if there is nothing below it either

    def read(name: str) -> Iterator[bytes]:
        path = f"{source.path}/{name}"
        with system.open(path, "rb", block_size=CHUNK_BYTES, cache_type="readahead") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    return [
        RemoteFile(name, size, partial(read, name))
        for name, size in sizes.items()
        if size is not None
    ]


def _size(system: Any, path: str) -> int | None:
    """Return an object's size in bytes, None if there is none of that name."""
    try:
        info = system.info(path)
    except FileNotFoundError:
        return None
    return int(info["size"]) if info["type"] == "file" else None


def _read(found: int) -> Iterator[bytes]:
    """Read the file that a descriptor (`O_PATH`) stands for, whatever its path leads to by now."""
    with open(f"/proc/self/fd/{found}", "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _telling(source: Source, file: RemoteFile) -> RemoteFile:
    """Return the file with its errors said as ours."""

    def chunks() -> Iterator[bytes]:
        try:
            yield from file.chunks()
        except Exception as error:
            raise _told(source, error) from error

    return RemoteFile(file.name, file.num_bytes, chunks)


def _told(source: Source, error: Exception) -> Exception:
    """Return what the caller is told of an error; one that is not ours may hold what is secret."""
    if isinstance(error, (RequestError, AdapterError)):
        return error
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return BadInput(f"there is nothing at {source}")
    if isinstance(error, PermissionError):
        return Forbidden(f"{source} may not be read by the server; see its credentials there")
    logger.warning("%s could not be read", source, exc_info=error)
    if isinstance(error, ImportError):
        return NotReady(f"{source.scheme}:// needs a package that the server lacks; see its log")
    return NotReady(f"{source} could not be read; the server's log says why")
