"""The writer, its feed and its sums, as one thing that an event loop owns. No ray."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from weakref import WeakValueDictionary

import orjson

from deployments.catalog.feed import Feed
from deployments.catalog.usage import UsageSums
from deployments.catalog.writer import Writer
from deployments.errors import NotReady, Unsure
from deployments.snapshot import Snapshot

_MOST_READERS = 4
# Messages between replicas are capped at 4 MB in throughput mode.
_MOST_BYTES = 2**20


class Ledger:
    """Writes one change after the other, off the event loop, and tells each to the watchers."""

    def __init__(self, writer: Writer, usage: UsageSums) -> None:
        """Take a writer that has read the store."""
        self._writer = writer
        self._usage = usage
        self._told = writer.snapshot
        self._turn = asyncio.Lock()
        self._reading = ThreadPoolExecutor(1, "history")
        self._num_readers = 0
        self.feed = Feed(writer.snapshot)
        self._turns = WeakValueDictionary[str, asyncio.Lock]()  # as long as somebody has it

    @property
    def snapshot(self) -> Snapshot:
        """The newest that this process knows."""
        return self._writer.snapshot

    def turn(self, task: str) -> asyncio.Lock:
        """Return what lets changes to a task be drafted, made ready and written one by one."""
        return self._turns.setdefault(task, asyncio.Lock())

    async def commit(
        self,
        transition: Callable[[Snapshot], Snapshot],
        *,
        by: str,
        task: str,
        what: dict[str, Any],
    ) -> Snapshot:
        """Write a change; it is durable when this returns.

        A caller that goes away ends nothing: what is written must be told too.

        Raises:
            Unsure: The store did not answer, so the change may have been made.
            Exception: What the transition raises.
        """
        write = functools.partial(
            self._writer.commit, transition, by=by, task=task, what=what, now=datetime.now(UTC)
        )
        return await asyncio.shield(asyncio.ensure_future(self._one(write)))

    async def refresh(self) -> Snapshot:
        """Read what another cluster on the same store has written.

        Raises:
            Unsure: The store did not answer.
        """
        return await asyncio.shield(asyncio.ensure_future(self._one(self._writer.refresh)))

    async def history(
        self, *, task: str | None, before: int | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        """Return changes, the latest first, and whether there are earlier ones.

        At most a mebibyte of them, by a thread of their own: a file is read for each, and changes
        that are made meanwhile must not wait for that.

        Raises:
            NotReady: Others are reading already.
        """
        if self._num_readers >= _MOST_READERS:
            raise NotReady("others are reading the history; try again in a second")
        self._num_readers += 1
        read = functools.partial(
            self._writer.journal.history, task=task, before=before, limit=limit + 1
        )
        try:
            changes = await asyncio.get_running_loop().run_in_executor(self._reading, read)
        finally:
            self._num_readers -= 1
        told: list[dict[str, Any]] = []
        num_bytes = 0
        for change in changes[:limit]:
            told.append(change.model_dump())
            num_bytes += len(orjson.dumps(told[-1]))
            if num_bytes > _MOST_BYTES:
                break
        return told, len(told) < len(changes)

    async def _one(self, work: Callable[[], Snapshot]) -> Snapshot:
        """Let the writer work, and tell what is new since the last time it was told."""
        async with self._turn:
            try:
                await asyncio.to_thread(work)
            except OSError as error:
                raise Unsure(f"the store does not answer ({error}); read the task again") from None
            finally:
                newest = self._writer.snapshot
                if newest is not self._told:
                    self._usage.changed(self._told, newest)
                    self._told = newest
                    await self.feed.publish(newest)
        return newest
