"""What watchers are told: the tasks that changed since the revision they hold. No ray."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from deployments.snapshot import Snapshot

# Messages between replicas are capped at 4 MB in throughput mode.
_PAGE_BYTES = 2**20
# Tasks that are gone and still told of by name; who is further behind is told everything.
_REMEMBERED = 10_000


class Feed:
    """The newest snapshot, and who waits for a newer one. Owned by one event loop."""

    def __init__(self, snapshot: Snapshot) -> None:
        """Take the snapshot to begin with."""
        self._snapshot = snapshot
        self._gone: dict[str, int] = {}  # task -> the first revision without it
        self._gone_since = snapshot.revision
        self._news = asyncio.Condition()
        self._closed = False

    async def publish(self, snapshot: Snapshot) -> None:
        """Tell a newer snapshot to all that wait; an older one is left alone."""
        async with self._news:
            if snapshot.revision <= self._snapshot.revision:
                return
            for task in self._snapshot.tasks.keys() - snapshot.tasks.keys():
                self._gone[task] = snapshot.revision
            for task in self._gone.keys() & snapshot.tasks.keys():
                del self._gone[task]
            if len(self._gone) > _REMEMBERED:
                self._gone.clear()
                self._gone_since = snapshot.revision
            self._snapshot = snapshot
            self._news.notify_all()

    async def close(self) -> None:
        """End all polls that wait."""
        async with self._news:
            self._closed = True
            self._news.notify_all()

    async def page(self, revision: int, after: str, wait_s: float) -> dict[str, Any]:
        """Answer a watcher.

        Args:
            revision: What it holds.
            after: The last task of the page before, empty for the first one.
            wait_s: How long to wait for something newer than it holds.

        Returns:
            `revision`, which the pages that follow bring it to; `tasks`, name -> record, None for
            one that is gone; `reset`, whether these are all tasks; `next`, for the page after this
            one, None if this is the last.
        """
        if revision >= self._snapshot.revision and not after:
            await self._wait(revision, wait_s)
        snapshot = self._snapshot
        reset = revision < self._gone_since
        changed: dict[str, Any] = {
            task: record
            for task, record in snapshot.tasks.items()
            if (reset or record.revision > revision) and task > after
        }
        if not reset:
            gone = (t for t, since in self._gone.items() if since > revision and t > after)
            changed.update(dict.fromkeys(gone))
        told: dict[str, Any] = {}
        num_bytes = 0
        for task in sorted(changed):
            record = changed[task] and changed[task].model_dump(mode="json")
            num_bytes += len(task) + len(orjson.dumps(record))
            if told and num_bytes > _PAGE_BYTES:
                return {
                    "revision": snapshot.revision, "tasks": told, "reset": reset,
                    "next": next(reversed(told)),
                }  # fmt: skip
            told[task] = record
        return {"revision": snapshot.revision, "tasks": told, "reset": reset, "next": None}

    async def _wait(self, revision: int, wait_s: float) -> None:
        async with self._news:
            newer = self._news.wait_for(lambda: self._closed or self._snapshot.revision > revision)
            try:
                await asyncio.wait_for(newer, wait_s)
            except TimeoutError:
                return
