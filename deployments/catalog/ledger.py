"""The writer, its feed and its sums, as one thing that an event loop owns. No ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from deployments.catalog.feed import Feed
from deployments.catalog.usage import UsageSums
from deployments.catalog.writer import Writer
from deployments.snapshot import Snapshot


class Ledger:
    """Writes one change after the other, off the event loop, and tells each to the watchers."""

    def __init__(self, writer: Writer, usage: UsageSums) -> None:
        """Take a writer that has read the store."""
        self._writer = writer
        self._usage = usage
        self._turn = asyncio.Lock()
        self.feed = Feed(writer.snapshot)

    @property
    def snapshot(self) -> Snapshot:
        """The newest that this process knows."""
        return self._writer.snapshot

    async def commit(
        self,
        transition: Callable[[Snapshot], Snapshot],
        *,
        by: str,
        task: str,
        what: dict[str, Any],
    ) -> Snapshot:
        """Write a change; it is durable when this returns. Raises what the transition does."""
        async with self._turn:
            before = self._writer.snapshot
            after = await asyncio.to_thread(
                self._writer.commit, transition, by=by, task=task, what=what, now=datetime.now(UTC)
            )
            await self._tell(before, after)
        return after

    async def refresh(self) -> Snapshot:
        """Read what another cluster on the same store has written."""
        async with self._turn:
            before = self._writer.snapshot
            after = await asyncio.to_thread(self._writer.refresh)
            await self._tell(before, after)
        return after

    async def history(
        self, *, task: str | None, before: int | None, limit: int
    ) -> list[dict[str, Any]]:
        """Return changes, the latest first; see `deployments.journal.Journal.history`."""
        changes = await asyncio.to_thread(
            self._writer.journal.history, task=task, before=before, limit=limit
        )
        return [change.model_dump() for change in changes]

    async def _tell(self, before: Snapshot, after: Snapshot) -> None:
        if after is not before:
            self._usage.changed(before, after)
            await self.feed.publish(after)
