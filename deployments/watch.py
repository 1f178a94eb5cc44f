"""The last snapshot of the catalog that somebody holds, kept up to date. No ray, no torch."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from deployments.snapshot import Snapshot, TaskRecord

logger = logging.getLogger("ray.serve")

Page = Mapping[str, Any]
Poll = Callable[[int, str], Awaitable[Page]]
Prepare = Callable[[Snapshot, Snapshot, Collection[str]], Awaitable[None]]

POLL_S = 2.0
"""Longest that the catalog keeps a poll waiting for news."""

# After that a poll is given up, in case its answer was lost.
_LONGEST_S = 60.0
# How long a first request waits for the store.
_FIRST_LOOK_S = 5.0


class Watch:
    """Follows the catalog by long polls; while it is away, by the store that it writes to.

    Owned by one event loop. Whoever asks for `snapshot` waits for nobody.

    Attributes:
        snapshot: The one that is held.
        away: Whether the catalog did not answer the last poll.
    """

    def __init__(
        self,
        read: Callable[[int], Snapshot | None],
        poll: Poll,
        prepare: Prepare,
        hold: Callable[[Snapshot], None] = lambda _: None,
        *,
        prepare_s: float = 2.0,
        patience_s: float = 1.0,
        every_s: float = 1.0,
    ) -> None:
        """Take where snapshots come from.

        Args:
            read: Reads the store's newest revision if there is one after the given one; it blocks,
                and is called in a thread.
            poll: Asks the catalog, as `deployments.catalog.feed.Feed.page` answers.
            prepare: Awaited with (old, new, names of the tasks that differ) before the new
                snapshot is held.
            hold: Called with it as it is.
            prepare_s: Longest that a new snapshot waits for that.
            patience_s: How much longer than `POLL_S` a poll may take before the store is read.
            every_s: How often the store is read while the catalog is away.
        """
        self._read, self._poll = read, poll
        self._prepare, self._hold = prepare, hold
        self._prepare_s, self._patience_s, self._every_s = prepare_s, patience_s, every_s
        self._contact_s = time.monotonic()
        self._turn = asyncio.Lock()
        self._first_look: asyncio.Task[None] | None = None
        self.away = False
        self._loop: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self.snapshot = Snapshot()

    @property
    def stale_s(self) -> float:
        """Seconds since the catalog or the store last said what is true, 0 while one of them does.

        A poll may wait for `POLL_S`, which is no silence.
        """
        silent_s = time.monotonic() - self._contact_s
        return 0.0 if silent_s <= POLL_S + self._patience_s + self._every_s else silent_s

    async def start(self) -> None:
        """Hold what the store says now, and follow from there on.

        Raises:
            Exception: What `read` raised: without it nobody knows what to answer.
        """
        await self._read_store()
        self._loop = asyncio.get_running_loop().create_task(self._follow())

    async def catch_up(self) -> None:
        """Hold what the store said after the first call of this; return at once later on.

        Changes wait for an ingress that Serve lists. One that Serve lists later has its first
        request later still, and reads there what did not wait for it.

        Raises:
            Exception: What `read` raised, or TimeoutError; the next call tries again.
        """
        look = self._first_look
        if look is None or (look.done() and (look.cancelled() or look.exception() is not None)):
            look = self._first_look = asyncio.get_running_loop().create_task(self._read_store())
        if not look.done():
            await asyncio.wait_for(asyncio.shield(look), _FIRST_LOOK_S)

    def stop(self) -> None:
        """Follow no more."""
        for task in (self._loop, self._looking):
            if task is not None:
                task.cancel()

    async def _follow(self) -> None:
        while True:
            asking = asyncio.ensure_future(self._ask())
            try:
                await self._meanwhile(asking)
                await self._install(asking.result())
                self._told(away=False)
            except Exception as error:
                self._told(away=True, why=error)
                self._look_meanwhile()
                await asyncio.sleep(self._every_s)
            finally:
                asking.cancel()

    async def _meanwhile(self, asking: asyncio.Future[Snapshot]) -> None:
        """Wait for the catalog's answer; when it is late, read the store until it comes.

        A call to a replica that has died waits for the one that takes its place.
        """
        wait_s, until_s = POLL_S + self._patience_s, time.monotonic() + _LONGEST_S
        while not (await asyncio.wait({asking}, timeout=wait_s))[0]:
            if time.monotonic() > until_s:
                raise TimeoutError(f"no answer in {_LONGEST_S:.0f} s")
            self._told(away=True, why=TimeoutError("no answer yet"))
            self._look_meanwhile()
            wait_s = self._every_s

    async def _ask(self) -> Snapshot:
        """Wait for news of the catalog, however many pages they fill."""
        held = self.snapshot
        page = await self._poll(held.revision, "")
        revision, tasks = page["revision"], {} if page["reset"] else dict(held.tasks)
        while True:
            for task, record in page["tasks"].items():
                tasks.pop(task, None)
                if record is not None:
                    tasks[task] = TaskRecord.model_validate(record)
            if page["next"] is None:
                break
            page = await self._poll(held.revision, page["next"])
        # What changed between the pages has a later revision, and comes with the next poll.
        return Snapshot(revision=revision, tasks=tasks)

    def _look_meanwhile(self) -> None:
        """Read the store, since the catalog does not answer; a store that hangs delays no poll."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        try:
            await self._read_store()
        except Exception as error:
            logger.error("catalog=away, and the store cannot be read: %s", error)

    async def _read_store(self) -> None:
        # What a slow store tells was true when it was asked, and perhaps no more.
        asked_s = time.monotonic()
        newer = await asyncio.to_thread(self._read, self.snapshot.revision)
        await self._install(newer or self.snapshot, asked_s)

    async def _install(self, new: Snapshot, true_s: float | None = None) -> None:
        """Hold a snapshot, once what it needs is prepared; an older one is never held.

        Args:
            new: The snapshot.
            true_s: When it was surely true; None for now.
        """
        async with self._turn:
            old = self.snapshot
            if new.revision > old.revision:
                names = {*old.tasks, *new.tasks}
                changed = {name for name in names if old.tasks.get(name) != new.tasks.get(name)}
                await self._prepared(old, new, changed)
                self.snapshot = new
                self._hold(new)
        self._contact_s = max(self._contact_s, true_s or time.monotonic())

    async def _prepared(self, old: Snapshot, new: Snapshot, changed: Collection[str]) -> None:
        try:
            await asyncio.wait_for(self._prepare(old, new, changed), self._prepare_s)
        except Exception as error:
            logger.warning("catalog revision=%d is held unprepared: %r", new.revision, error)

    def _told(self, *, away: bool, why: Exception | None = None) -> None:
        """Say once that the catalog went, or came back."""
        if away != self.away:
            self.away = away
            state = f"away, reading the store instead: {why!r}" if away else "back"
            logger.warning("catalog=%s revision=%d", state, self.snapshot.revision)
