"""Messages on a connection between two processes of ours: their length, and so many bytes."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

_LENGTH = struct.Struct("<I")
# Calls and replies have their own bounds, far below.
MAX_BYTES = 2**26
# Seconds without a word, between two questions whether anybody is there, and how many of these;
# milliseconds that what was sent is not confirmed.
_SILENCE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 5_000}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a model replica takes calls that do not go through Serve.

    Attributes:
        host: Of its node.
        port: TCP.
        ask: What whoever calls there says first, a secret of 32 bytes.
        answer: What is said to it then, another: nobody else is there now.
    """

    host: str
    port: int
    ask: bytes = field(repr=False)
    answer: bytes = field(repr=False)


class Frames(asyncio.Protocol):
    """One end of a connection; whoever has it is told of messages and of the end. Knows no Ray.

    Attributes:
        max_bytes: A longer message ends the connection.
    """

    def __init__(
        self,
        heard: Callable[[Frames, bytes], None],
        ended: Callable[[Frames], None],
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Take who is told; if `heard` raises, the connection ends."""
        self.max_bytes = max_bytes
        self._heard, self._ended = heard, ended
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a connection."""
        return self._transport is not None

    def send(self, message: bytes) -> None:
        """Send a message; nothing happens once the connection has ended."""
        if self._transport is not None:
            self._transport.write(_LENGTH.pack(len(message)) + message)

    def close(self) -> None:
        """End the connection; what is still on its way is lost."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin; the event loop calls it."""
        _notice_silence(transport.get_extra_info("socket"))
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclass

    def data_received(self, data: bytes) -> None:
        """Take bytes as they come; the event loop calls it."""
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= _LENGTH.size and self._transport is not None:
            (length,) = _LENGTH.unpack_from(self._buffer, at)
            if length > self.max_bytes:
                self.close()
                break
            begin, end = at + _LENGTH.size, at + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            self._heard(self, bytes(self._buffer[begin:end]))
            at = end
        del self._buffer[:at]

    def connection_lost(self, error: Exception | None) -> None:
        """End; the event loop calls it."""
        self._transport = None
        self._ended(self)


def _notice_silence(connection: socket.socket) -> None:
    """Have a connection end if the other side's kernel says nothing for some seconds.

    Else one that is cut without a word (a firewall, a node without power) would be waited on for a
    quarter of an hour.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _SILENCE.items():
        if hasattr(socket, name):  # these are Linux's
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
