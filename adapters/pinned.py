"""Tasks that stay in their slots, whoever else comes. No torch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol

logger = logging.getLogger("ray.serve")


class Keeps(Protocol):
    """Who sits in which slot, as far as it matters here; see `adapters.slots.Slots`."""

    async def keep(self, version: str) -> None:
        """Load a version into a slot if it is in none, and evict it no more."""

    def let_go(self, version: str) -> None:
        """Let a version be evicted again; it need not have been kept."""


class Pinned:
    """Keeps the current version of some tasks in slots. Owned by one event loop."""

    def __init__(
        self, tasks: Collection[str], slots: Keeps, find: Callable[[str], Awaitable[str]]
    ) -> None:
        """Take the tasks, the slots, and what reads a task and returns its `task@version`."""
        self._kept: dict[str, str | None] = dict.fromkeys(tasks)
        self._slots = slots
        self._find = find

    async def load(self) -> None:
        """Bring all tasks into slots; one that cannot be served is logged with its problem."""
        problems = await asyncio.gather(*map(self._load, self._kept))
        if self._kept:
            num_kept = sum(problem is None for problem in problems)
            logger.info("pinned_tasks: %d of %d are in their slots", num_kept, len(problems))
        for task, problem in zip(self._kept, problems, strict=True):
            if problem is not None:
                logger.warning(
                    "pinned_tasks: %s is not in a slot, and will be from its first good request "
                    "on: %s", task, problem,
                )  # fmt: skip

    async def follow(self, task: str, version: str) -> None:
        """Keep what now answers a task in the place of what did; `version` is in a slot already."""
        if task not in self._kept or self._kept[task] == version:
            return
        old, self._kept[task] = self._kept[task], version
        if old is not None:
            self._slots.let_go(old)
        try:
            await self._slots.keep(version)
        except Exception as error:  # it is answered all the same, until others need the slot
            logger.warning("pinned_tasks: %s cannot be kept: %s", version, error)

    async def _load(self, task: str) -> Exception | None:
        try:
            version = await self._find(task)
            await self._slots.keep(version)
        except Exception as error:  # a task that cannot be served must not stop the start
            return error
        self._kept[task] = version
        return None
