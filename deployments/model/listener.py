"""Where a model replica takes calls that do not go through Serve. Knows no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from deployments.frames import MAX_BYTES, Address, Frames
from deployments.rows import Reply

logger = logging.getLogger("ray.serve")

_SECRET_BYTES = 32
# How long somebody may be connected who has not said the secret.
_UNKNOWN_S = 5.0
# How long a replica that stops waits for the ingresses to hang up. They do when they hear that
# Serve has removed it; they ask once a second, and hear nothing new while another replica hangs.
_HANG_UP_S = 3.0


class Listener:
    """Answers the calls of whoever knows its secret, each as soon as there is something to say.

    What is read is unpickled: whoever may call may do everything here, as with Ray's own calls. The
    secret is told through those.

    Attributes:
        address: Where to call and what to say; None while nobody can.
    """

    def __init__(self, call: Callable[..., Awaitable[Reply]]) -> None:
        """Take what answers a call; see `deployments.model.exchange.Exchange.call`."""
        self.address: Address | None = None
        self._call = call
        self._calls: dict[Frames, set[asyncio.Task[None]]] = {}  # by who may call
        self._unknown: dict[Frames, asyncio.TimerHandle] = {}
        self._hung_up = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def start(self, host: str | None) -> None:
        """Listen on a free port of a host's address; None is nowhere."""
        if host is None:
            return
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(self._connected, host, 0)
        except OSError as error:  # a node may go by an address that is not its own
            logger.warning("nobody can call this replica at %s (%s), but by Serve", host, error)
            return
        port = self._server.sockets[0].getsockname()[1]
        self.address = Address(
            host, port, secrets.token_bytes(_SECRET_BYTES), secrets.token_bytes(_SECRET_BYTES)
        )

    async def close(self) -> None:
        """Take no more callers, and wait until those that are there have hung up, but not long."""
        if self._server is None:
            return
        self.address = None
        self._server.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HANG_UP_S):
                while self._calls:
                    self._hung_up.clear()
                    await self._hung_up.wait()
        for frames in [*self._calls, *self._unknown]:
            frames.close()

    def _connected(self) -> Frames:
        frames = Frames(self._heard, self._ended, max_bytes=_SECRET_BYTES)
        loop = asyncio.get_running_loop()
        self._unknown[frames] = loop.call_later(_UNKNOWN_S, frames.close)
        return frames

    def _heard(self, frames: Frames, message: bytes) -> None:
        calls = self._calls.get(frames)
        if calls is None:
            self._let_in(frames, message)
            return
        number, given = pickle.loads(message)
        call = asyncio.get_running_loop().create_task(self._reply(frames, number, given))
        calls.add(call)
        call.add_done_callback(calls.discard)

    def _let_in(self, frames: Frames, message: bytes) -> None:
        if self.address is None or not secrets.compare_digest(message, self.address.ask):
            frames.close()
            return
        self._unknown.pop(frames).cancel()
        frames.max_bytes = MAX_BYTES
        self._calls[frames] = set()
        frames.send(self.address.answer)

    async def _reply(self, frames: Frames, number: int, given: tuple[Any, ...]) -> None:
        try:
            frames.send(pickle.dumps((number, await self._call(*given))))
        except Exception as error:
            logger.error("a call of an ingress failed", exc_info=error)
            frames.close()  # so that it hears of it

    def _ended(self, frames: Frames) -> None:
        if frames in self._unknown:
            self._unknown.pop(frames).cancel()
        for call in self._calls.pop(frames, ()):
            call.cancel()
        self._hung_up.set()
