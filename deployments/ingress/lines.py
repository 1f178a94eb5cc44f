"""Connections to model replicas, which cost less than Serve's calls. Knows no Ray."""

from __future__ import annotations

import asyncio
import itertools
import logging
import pickle
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextvars import Context
from functools import partial

from deployments.frames import Address, Frames
from deployments.ingress.calls import is_cancelled
from deployments.ingress.outbox import ReplicaLost
from deployments.rows import Parcel, Reply

logger = logging.getLogger("ray.serve")

# How long it may take to find a replica and connect; that fails or not, how long until it is tried
# again.
_OPEN_S, _AGAIN_S = 5.0, 5.0
_ENDED = "the connection to the replica has ended"


class Line:
    """A connection to one replica that has shown that it is that one."""

    def __init__(self, address: Address, ended: Callable[[Line], None]) -> None:
        """Take the other end, and who is told when this is of no use any more."""
        self._address, self._ended = address, ended
        self._frames = Frames(self._heard, self._over)
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._known: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_open(self) -> bool:
        """Whether it can be called over."""
        return self._frames.is_open

    async def open(self) -> None:
        """Connect.

        Raises:
            OSError: Nobody is there, or somebody else.
        """
        loop, address = asyncio.get_running_loop(), self._address
        try:
            await loop.create_connection(lambda: self._frames, address.host, address.port)
            self._frames.send(address.ask)
            await self._known
        except BaseException:
            self._known.cancel()
            self._frames.close()
            raise

    async def call(
        self, ingress: str, heard: int, parcels: Sequence[Parcel], gone: Sequence[int]
    ) -> Reply:
        """Call; see `deployments.model.exchange.Exchange.call`.

        Raises:
            ReplicaLost: The connection has ended, and most likely the replica with it.
        """
        if not self._frames.is_open:
            raise ReplicaLost(_ENDED)
        number = next(self._numbers)
        message = pickle.dumps((number, (ingress, heard, parcels, gone)))
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = reply
        self._frames.send(message)
        try:
            return await reply
        finally:
            self._waiting.pop(number, None)

    def close(self) -> None:
        """Hang up."""
        self._frames.close()

    def _heard(self, frames: Frames, message: bytes) -> None:
        if not self._known.done():
            if not secrets.compare_digest(message, self._address.answer):
                self._known.set_exception(ConnectionError("somebody else answers there"))
                frames.close()  # unread: it may be anything
            else:
                self._known.set_result(None)
            return
        number, reply = pickle.loads(message)
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)

    def _over(self, frames: Frames) -> None:
        if not self._known.done():
            self._known.set_exception(ConnectionError("it does not let us in"))
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ReplicaLost(_ENDED))
        self._ended(self)


class Lines:
    """The connections of an ingress, by replica. One event loop's."""

    def __init__(self, find: Callable[[str], Awaitable[Address | None]]) -> None:
        """Take what finds out where a replica listens; None is nowhere."""
        self._find = find
        self._lines: dict[str, Line] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._unreached: set[str] = set()  # that was said

    def to(self, replica: str) -> Line | None:
        """Return the connection to a replica; None if there is none, or none yet."""
        line = self._lines.get(replica)
        if line is None and replica not in self._opening:
            # Of no request, whose end would be its own.
            opening = asyncio.get_running_loop().create_task(self._open(replica), context=Context())
            self._opening[replica] = opening
            opening.add_done_callback(lambda _: self._opening.pop(replica, None))
        return line

    def keep(self, replicas: Collection[str]) -> None:
        """Hang up on all other replicas."""
        for name in self._lines.keys() - {*replicas}:
            self._lines.pop(name).close()
        for name in self._opening.keys() - {*replicas}:
            self._opening[name].cancel()
        self._unreached &= {*replicas}

    async def _open(self, replica: str) -> None:
        try:
            async with asyncio.timeout(_OPEN_S):
                address = await self._find(replica)
                if address is not None:
                    line = Line(address, partial(self._ended, replica))
                    await line.open()
                    if line.is_open:
                        self._lines[replica] = line
                        return
        except asyncio.CancelledError:
            if is_cancelled():
                raise
        except Exception as error:
            if replica not in self._unreached:
                self._unreached.add(replica)
                logger.warning("calls to %s go through Serve alone: %r", replica, error)
        await asyncio.sleep(_AGAIN_S)

    def _ended(self, replica: str, line: Line) -> None:
        if self._lines.get(replica) is line:
            del self._lines[replica]
