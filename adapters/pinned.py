"""Versions that stay in their slots, whoever else comes. No torch."""

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
    """Keeps versions of some tasks in slots. Owned by one event loop.

    A task is pinned by name, and then whichever version last answered it stays; or it was said
    which of its versions stay.
    """

    def __init__(
        self, tasks: Collection[str], slots: Keeps, find: Callable[[str], Awaitable[str]]
    ) -> None:
        """Take the tasks by name, the slots, and what reads a task and returns `task@version`."""
        self._tasks = frozenset(tasks)
        self._said: dict[str, frozenset[str] | None] = dict.fromkeys(tasks)
        self._kept: dict[str, set[str]] = {}
        self._refused: set[str] = set()  # what could not be kept, and is not tried at every answer
        self._slots = slots
        self._find = find

    async def load(self) -> None:
        """Bring all into slots; a task that cannot be served is logged with its problem."""
        tasks = list(self._said)
        problems = await self.bring(tasks)
        if tasks:
            num_kept = len(tasks) - len(problems)
            logger.info("pinned_tasks: %d of %d are in their slots", num_kept, len(tasks))

    def say(self, task: str, versions: Collection[str] | None) -> None:
        """Set which versions (`task@version`) of a task stay; others are let go.

        None forgets what was said; of a task that is pinned by name the next answer's stays.
        """
        self._refused.clear()  # there may be room now
        if versions is None and task in self._tasks:
            self._said[task] = None
        elif versions:
            self._said[task] = frozenset(versions)
        else:
            self._said.pop(task, None)
        for version in self._kept.get(task, set()).difference(versions or ()):
            self._let_go(task, version)

    async def bring(self, tasks: Collection[str]) -> dict[str, Exception]:
        """Bring what stays of some tasks into slots; return, and log, the problems by task."""
        said = [task for task in tasks if task in self._said]
        problems = await asyncio.gather(*map(self._bring, said))
        told = {task: problem for task, problem in zip(said, problems, strict=True) if problem}
        for task, problem in told.items():
            logger.warning(
                "pinned_tasks: %s is not in a slot, and will be from its first good request "
                "on: %s", task, problem,
            )  # fmt: skip
        return told

    async def answered(self, task: str, version: str) -> None:
        """Keep what answers a task, if it is to stay; `version` is in a slot already."""
        if task not in self._said or version in self._kept.get(task, ()):
            return
        said = self._said[task]
        if version in self._refused or (said is not None and version not in said):
            return
        if said is None:
            for old in [*self._kept.get(task, ())]:
                self._let_go(task, old)
        try:
            await self._keep(task, version)
        except Exception as error:  # it is answered all the same, until others need the slot
            self._refused.add(version)
            logger.warning("pinned_tasks: %s cannot be kept: %s", version, error)

    async def _bring(self, task: str) -> Exception | None:
        """Keep what stays of a task; return the first problem, which must not stop the others."""
        said = self._said.get(task, frozenset())
        try:
            versions = [await self._find(task)] if said is None else sorted(said)
        except Exception as error:
            return error
        if self._said.get(task, frozenset()) != said:
            return None  # something else was said meanwhile
        tries = (self._keep(task, version) for version in versions)
        problems = await asyncio.gather(*tries, return_exceptions=True)
        return next((problem for problem in problems if isinstance(problem, Exception)), None)

    async def _keep(self, task: str, version: str) -> None:
        await self._slots.keep(version)
        said = self._said.get(task, ())
        if said is None or version in said:
            self._kept.setdefault(task, set()).add(version)
        else:  # it was said meanwhile that it need not stay
            self._slots.let_go(version)

    def _let_go(self, task: str, version: str) -> None:
        self._kept[task].discard(version)
        self._slots.let_go(version)
