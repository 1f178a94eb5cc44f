"""Which revision each ingress holds, by its own polls. No ray."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

Running = Callable[[], Awaitable[Mapping[str, str] | None]]
"""Serve's list: name -> its actor's of each ingress that runs; None if it cannot be had now."""
IsDead = Callable[[str], Awaitable[bool]]
"""Tells by its actor's name whether an ingress has ended, which that list says a while later."""

_UNKNOWN = "ingresses that cannot be listed"
# How often those who are waited for are looked up anew: one of them may have ended.
_LIST_EVERY_S = 0.5


class Ingresses:
    """Knows who answers by which revision. Owned by one event loop.

    An ingress polls for what is newer than it holds, so its next poll says that it holds what the
    one before told it.
    """

    def __init__(self, running: Running, is_dead: IsDead) -> None:
        """Take who says which ingresses there are."""
        self._running, self._is_dead = running, is_dead
        self._held: dict[str, int] = {}
        self._polled = asyncio.Event()

    def hold(self, name: str, revision: int) -> None:
        """Note what an ingress holds when it polls."""
        if self._held.get(name, -1) < revision:
            self._held[name] = revision
            self._polled.set()

    async def reach(self, revision: int, wait_s: float) -> list[str]:
        """Wait until all that run hold a revision; return the names of those that do not in time.

        One that Serve lists after this has begun reads the store at its first request (see
        `deployments.watch.Watch.catch_up`), and so need not be waited for.
        """
        until_s = time.monotonic() + wait_s
        dead: set[str] = set()
        while True:
            running = await self._running()
            if running is not None:
                self._held = {name: held for name, held in self._held.items() if name in running}
            names = {_UNKNOWN} if running is None else running.keys() - dead
            late = sorted(self._behind(names, revision))
            left_s = until_s - time.monotonic()
            if not late or left_s <= 0:
                return late
            for name in await self._wait_for(late, revision, min(left_s, _LIST_EVERY_S)):
                if running is not None and await self._is_dead(running[name]):
                    dead.add(name)

    def _behind(self, names: Iterable[str], revision: int) -> list[str]:
        return [name for name in names if self._held.get(name, -1) < revision]

    async def _wait_for(self, late: Collection[str], revision: int, wait_s: float) -> list[str]:
        """Wait until all of some hold a revision, or for so long; return those that do not."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while self._behind(late, revision):
                    self._polled.clear()
                    await self._polled.wait()
        return self._behind(late, revision)
