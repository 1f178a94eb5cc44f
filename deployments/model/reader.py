"""Reads adapters from the store: off the event loop, and what fails not twice. Knows no Ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from adapters.artifact import Artifact
from adapters.errors import AdapterRefused
from adapters.failures import Failures
from adapters.rules import lay_over
from adapters.store import RULES, Files, Look, Store
from deployments.model.engine import Engine, Loaded

logger = logging.getLogger("ray.serve")
T = TypeVar("T")
Rest = Callable[[float], Awaitable[None]]
# At a time: a load is mostly Python, and each more that runs keeps forward and event loop waiting.
_LOADS = 2


@dataclass(frozen=True, slots=True)
class Held:
    """An adapter in host RAM, and what it was read from.

    Attributes:
        loaded: What a slot needs; its rules may not have been looked at.
        look: The folder, just before it was read.
        task_json: The rules that lie there.
    """

    loaded: Loaded
    look: Look
    task_json: bytes


class Reader:
    """Reads and validates folders, so that rows keep flowing meanwhile. Owned by one event loop."""

    def __init__(self, engine: Engine, store: Store) -> None:
        """Take what validates and packs, and where adapters lie."""
        self.store = store
        self.failures = Failures()
        self._engine = engine
        self._threads = ThreadPoolExecutor(_LOADS, "load")

    async def look(self, task: str, version: str | None = None) -> Look:
        """Return what `adapters.store.Store.look` does."""
        return await self._off_loop(self.store.look, task, version)

    async def read(
        self,
        task: str,
        version: str | None = None,
        rules: Mapping[str, Any] | None = None,
        rest: Rest | None = None,
    ) -> Held:
        """Read and validate a folder.

        What failed fails again at once, as long as the folder is as it was.

        Args:
            task: The task.
            version: The version, None for what the plain folder holds.
            rules: Laid over its own; with None its rules are not looked at.
            rest: Awaited after each piece of the work with the seconds that it took.

        Raises:
            AdapterError: It is not there, not complete, or refused with all its problems.
        """
        look = await self._off_loop(self.store.look, task, version)
        mark = (look, repr(rules))
        with self.failures.remembering(f"{task}@{version or ''}", mark):
            try:
                files = await self._piece(rest, self.store.read, task, version)
                task_json = files.contents.get(RULES, b"{}")
                ruled = rules is not None
                files = _under(files, rules or {})
                artifact = await self._piece(rest, self._engine.validate, files, ruled)
                loaded = await self._piece(rest, self._engine.pack, artifact)
            except AdapterRefused as error:
                logger.warning("adapter=%s refused: %s", task, "; ".join(error.problems))
                raise
        return Held(loaded, look, task_json)

    async def under_rules(self, held: Held, rules: Mapping[str, Any]) -> Artifact:
        """Return what was read with its own rules, and others laid over them.

        Raises:
            AdapterRefused: They do not fit it; with every problem that was found.
        """
        task_json = lay_over(held.task_json, rules)
        return await self._off_loop(self._engine.under_rules, held.loaded.artifact, task_json)

    async def check(self, task: str, staging: str | None, rules: Mapping[str, Any]) -> Artifact:
        """Validate what was staged, or None: a task's plain folder, as `read` would; keep nothing.

        Raises:
            AdapterError: It is not there, or refused with all its problems.
        """
        if staging is None:
            files = await self._off_loop(self.store.read, task)
        else:
            files = await self._off_loop(self.store.read_staged, staging, task)
        artifact = await self._off_loop(self._engine.validate, _under(files, rules))
        return (await self._off_loop(self._engine.pack, artifact)).artifact

    async def _piece(self, rest: Rest | None, work: Callable[..., T], *args: Any) -> T:
        started_s = time.perf_counter()
        result = await self._off_loop(work, *args)
        if rest is not None:
            await rest(time.perf_counter() - started_s)
        return result

    async def _off_loop(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)


def _under(files: Files, rules: Mapping[str, Any]) -> Files:
    """Return an adapter's files with rules laid over their own."""
    task_json = lay_over(files.contents.get(RULES, b"{}"), rules)
    return replace(files, contents={**files.contents, RULES: task_json}) if rules else files
