"""Tasks that are no more than a folder in the store, and what each says of itself as it is now."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from adapters.errors import AdapterIncomplete, AdapterRefused, StoreUnreachable, TaskNotFound
from adapters.store import Look, Store
from deployments.errors import NotReady
from deployments.rows import Facts

Describe = Callable[[str], Awaitable[Facts]]


@dataclass(frozen=True, slots=True)
class _Known:
    look: Look | None  # None if it is in doubt
    said: Facts | AdapterRefused
    checked_s: float


class Folders:
    """What the model said of each folder, until the folder changes.

    Owned by one event loop. A folder that is still being copied is waited for, and neither served
    nor remembered; one that was refused is remembered until it changes.
    """

    def __init__(
        self,
        store: Store,
        describe: Describe,
        *,
        settle_s: float = 1.0,
        patience_s: float = 5.0,
        list_every_s: float | None = None,
    ) -> None:
        """Take the store, and who validates a folder.

        Args:
            store: Where the folders are.
            describe: Asks the model; raises AdapterError.
            settle_s: A folder counts as copied when it has not changed for so long; also how
                often a known one is looked at.
            patience_s: How long a request waits for a folder to settle.
            list_every_s: How old a listing of the store may be that says which folders there are:
                where each look is a request to an object store, unknown names must cost none.
                None looks at once, so that a folder is served on the first request after it came.
        """
        self._store = store
        self._describe = describe
        self._settle_s = settle_s
        self._patience_s = patience_s
        self._list_every_s = list_every_s
        self._listing: asyncio.Task[set[str]] | None = None
        self._listed_s = -math.inf
        self._known: dict[str, _Known] = {}
        self._flights: dict[str, asyncio.Task[Facts]] = {}

    async def names(self) -> list[str]:
        """Return the names of all tasks in the store, sorted."""
        if self._list_every_s is not None:
            return sorted(await self._listed(self._list_every_s))
        return await asyncio.to_thread(self._store.tasks)

    async def get(self, task: str) -> Facts:
        """Return what a task is.

        Raises:
            TaskNotFound: The store has no such folder.
            AdapterIncomplete: It is still being copied.
            AdapterRefused: It cannot be served.
        """
        known = self._known.get(task)
        if known is not None and time.monotonic() - known.checked_s < self._settle_s:
            return _told(known)
        flight = self._flights.get(task)
        if flight is None:
            # Shared by all requests for the task, and not ended by the first of them going away.
            flight = asyncio.get_running_loop().create_task(self._refresh(task))
            self._flights[task] = flight
            flight.add_done_callback(lambda done: self._landed(task, done))
        try:
            return await asyncio.shield(flight)
        finally:
            del flight  # whose error has this frame in its traceback: a cycle

    def doubt(self, task: str) -> None:
        """Ask about a task again at its next request; what is known holds until the answer."""
        known = self._known.get(task)
        if known is not None:
            self._known[task] = replace(known, look=None, checked_s=-math.inf)
        self._flights.pop(task, None)  # it may have looked before the change

    def _landed(self, task: str, flight: asyncio.Task[Facts]) -> None:
        if self._flights.get(task) is flight:
            del self._flights[task]
        _see(flight)

    async def _listed(self, every_s: float) -> set[str]:
        """Return the names in the store, listed once for all that ask meanwhile."""
        now_s = time.monotonic()
        listing = self._listing
        if listing is None or (listing.done() and now_s - self._listed_s >= every_s):
            listing = asyncio.get_running_loop().create_task(self._list())
            listing.add_done_callback(_see)
            self._listing, self._listed_s = listing, now_s
        try:
            return await asyncio.shield(listing)
        finally:
            del listing  # as in `get`

    async def _list(self) -> set[str]:
        return set(await asyncio.to_thread(self._store.tasks))

    async def _check_listed(self, task: str) -> None:
        if self._list_every_s is not None and task not in await self._listed(self._list_every_s):
            raise TaskNotFound(task)

    async def _refresh(self, task: str) -> Facts:
        known = self._known.get(task)
        try:
            if known is None:
                await self._check_listed(task)
            look: Look | None = await self._settled(task, known)
            if known is not None and look == known.look:
                said = known.said
            else:
                said = await self._ask(task)
        except TaskNotFound:
            self._known.pop(task, None)
            if self._listing is not None and self._listing.done():
                # Listed, but no folder to look at: not again before the next listing.
                (await self._listing).discard(task)
            raise
        except (AdapterIncomplete, NotReady, StoreUnreachable):
            # A new copy over a served folder: the old one answers until the new one is whole. So it
            # does while the store, or every replica, is away.
            if known is None:
                raise
            look, said = known.look, known.said
        fresh = _Known(look, said, time.monotonic())
        self._known[task] = fresh
        return _told(fresh)

    async def _settled(self, task: str, known: _Known | None) -> Look:
        """Wait until a folder has not changed for a while, and return its look."""
        look = await asyncio.to_thread(self._store.look, task)
        seen_s = started_s = time.monotonic()
        while known is None or look != known.look:
            now_s = time.monotonic()
            # Clocks of a store and of this machine may differ: what we watched counts as well.
            quiet_s = max(time.time() - look.changed_s, now_s - seen_s)
            if quiet_s >= self._settle_s:
                break
            if known is not None or now_s - started_s > self._patience_s:
                raise AdapterIncomplete(task, "its folder is still changing")
            await asyncio.sleep(min(0.1, self._settle_s - quiet_s))
            before, look = look, await asyncio.to_thread(self._store.look, task)
            if look != before:
                seen_s = time.monotonic()
        return look

    async def _ask(self, task: str) -> Facts | AdapterRefused:
        try:
            return await self._describe(task)
        except AdapterRefused as error:
            return AdapterRefused(error.task, error.problems)  # as ours, without Ray's traceback


def _told(known: _Known) -> Facts:
    if isinstance(known.said, AdapterRefused):
        # A new one each time: an error that is raised again and again keeps every traceback.
        raise AdapterRefused(known.said.task, known.said.problems)
    return known.said


def _see(done: asyncio.Task[Any]) -> None:
    """See an error here, so that one that nobody waits for is no warning."""
    if not done.cancelled():
        done.exception()
