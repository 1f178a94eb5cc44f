"""Tasks as `GET /v1/tasks` shows them."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Awaitable, Callable
from typing import Any

from adapters.errors import AdapterError
from deployments.ingress.tasks import Tasks
from deployments.snapshot import TaskRecord

# How many folders are described at a time for a listing: a cold one is a load.
_DESCRIBED_AT_ONCE = 8

AskUsage = Callable[[list[str]], Awaitable[dict[str, dict[str, Any]] | None]]
"""Asks the catalog what was counted of tasks, by version; None if it is away."""


class Listing:
    """Shows tasks of the catalog and of folders alike."""

    def __init__(self, tasks: Tasks, usage: AskUsage | None = None) -> None:
        """Take who knows the tasks, and who has counted their use, None where nobody does."""
        self._tasks = tasks
        self._usage = usage

    async def page(self, after: str, limit: int) -> dict[str, Any]:
        """Return a page of tasks by name, `next` with it unless it is the last.

        A task of the catalog that nobody has asked for here is shown without its facts: a listing
        loads no version.
        """
        names = await self._tasks.names()
        start = bisect_right(names, after)
        page = names[start : start + limit]
        turns = asyncio.Semaphore(_DESCRIBED_AT_ONCE)
        entries = await asyncio.gather(*(self._entry(name, turns) for name in page))
        told: dict[str, Any] = {"tasks": await self._with_usage(page, entries)}
        if start + limit < len(names):
            told["next"] = page[-1]
        return told

    async def task(self, task: str) -> tuple[dict[str, Any], int]:
        """Return all that is known of a task, and its etag.

        Raises:
            AdapterError: There is no such task, or it is a folder that cannot be served.
        """
        record = self._tasks.record(task)
        if record is None:
            entry, etag = dict(await self._tasks.folders.get(task)), 0
        else:
            entry, etag = self._managed(task, record), record.revision
            try:
                entry |= await self._tasks.facts_of(task, record.active, record)
            except AdapterError as error:
                entry["error"] = str(error)
        await self._with_usage([task], [entry])
        return entry, etag

    async def _entry(self, name: str, turns: asyncio.Semaphore) -> dict[str, Any]:
        """Describe a task; one that cannot be served says why."""
        entry: dict[str, Any] = {"task": name}
        try:
            record = self._tasks.record(name)
            if record is None:
                async with turns:
                    return dict(await self._tasks.folders.get(name))
            entry = self._managed(name, record)
            entry |= self._tasks.known_facts(name, record) or {}
        except AdapterError as error:
            entry["error"] = str(error)
        return entry

    def _managed(self, task: str, record: TaskRecord) -> dict[str, Any]:
        return {
            "task": task,
            "version": record.active,
            "etag": record.revision,
            "revision": self._tasks.snapshot.revision,
            "active": record.active,
            "versions": {
                version: {"created_s": one.created_s, "by": one.by, "source": one.source}
                for version, one in record.versions.items()
                if version not in record.doomed
            },
            "previous": list(record.previous),
            "traffic": dict(record.traffic),
            "max_error_rate": record.max_error_rate,
            "shadow": None
            if record.shadow is None
            else {"version": record.shadow.version, "share": record.shadow.share},
            "fallback": record.fallback,
            "pinned": record.pinned,
            "overrides": dict(record.rules),
        }

    async def _with_usage(
        self, names: list[str], entries: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        if self._usage is not None and names:
            usage = await self._usage(names)
            for name, entry in zip(names, entries, strict=True):
                entry["usage"] = None if usage is None else usage.get(name, {})
        return entries
