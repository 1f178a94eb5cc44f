"""A file that is somewhere else, read as it comes."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from deployments.errors import NotReady, TooLarge

CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a source.

    Attributes:
        name: Without its folder.
        num_bytes: As the listing has it, None if it does not say.
        chunks: Opens it and gives its content; closes it with the generator.
    """

    name: str
    num_bytes: int | None
    chunks: Callable[[], Iterator[bytes]]


class Allowance:
    """What all files of a source may cost together."""

    def __init__(self, max_bytes: int, max_s: float) -> None:
        """Take the limits; the clock starts now."""
        self._max_bytes, self._left_bytes = max_bytes, max_bytes
        self._ends_s = time.monotonic() + max_s

    def take(self, num_bytes: int) -> None:
        """Take off what has come, or what is to come.

        Raises:
            TooLarge: It is more than there is.
            NotReady: It took too long.
        """
        self._left_bytes -= num_bytes
        if self._left_bytes < 0:
            raise TooLarge(
                f"the source's files are over {self._max_bytes} bytes; raise max_upload_bytes"
            )
        if time.monotonic() > self._ends_s:
            raise NotReady("the source sends too slowly; try again")


class Download(io.RawIOBase):
    """The content of a remote file, which is opened by the first read."""

    def __init__(self, file: RemoteFile, allowance: Allowance) -> None:
        """Take the file, and what it may cost."""
        self._content = _counted(file, allowance)
        self._rest = b""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill the buffer as far as what has come does; 0 at the end.

        Raises:
            RequestError: It cannot be read, costs too much, or ended early.
        """
        while not self._rest:
            try:
                self._rest = next(self._content)
            except StopIteration:
                return 0
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def close(self) -> None:
        """Let go of the connection."""
        self._content.close()
        super().close()


def _counted(file: RemoteFile, allowance: Allowance) -> Generator[bytes, None, None]:
    num_bytes = 0
    for chunk in file.chunks():
        num_bytes += len(chunk)
        allowance.take(len(chunk))
        yield chunk
    if file.num_bytes not in (None, num_bytes):
        raise NotReady(f"{file.name} ended after {num_bytes} of {file.num_bytes} bytes; try again")
