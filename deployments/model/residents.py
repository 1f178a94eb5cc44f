"""The adapters of one replica: read, kept in RAM, and brought into slots. Knows no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from adapters.artifact import Artifact
from adapters.errors import AdapterChanged, AdapterError, AdapterRefused
from adapters.failures import Failures
from adapters.host import Host
from adapters.pinned import Pinned
from adapters.slots import Slots
from adapters.store import Store
from deployments.model.engine import Engine, Loaded

logger = logging.getLogger("ray.serve")
T = TypeVar("T")
Rest = Callable[[float], Awaitable[None]]
# At a time: a load is mostly Python, and each more that runs keeps forward and event loop waiting.
_LOADS = 2
# Of the time while rows are answered, how much prefetching may take.
_PREFETCH_SHARE = 0.1


class Residents:
    """Which adapters a replica has, and where: store, host RAM, slot. Owned by one event loop."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        *,
        host_bytes: int,
        max_slots: int | None,
        pinned_tasks: Collection[str],
        write: Callable[[int, Loaded, Sequence[int]], Awaitable[None]],
    ) -> None:
        """Take what reads adapters, and where they are; `load_pinned` comes next.

        Args:
            engine: Validates and packs; its slots are written by `write` alone.
            store: Where adapters lie.
            host_bytes: RAM for those that wait for a slot.
            max_slots: As in `adapters.slots.Slots`.
            pinned_tasks: Tasks that never leave their slots.
            write: As in `adapters.slots.Slots`.
        """
        self.store = store
        self.failures = Failures()
        self.num_calls = 0
        self._engine = engine
        self._loads = ThreadPoolExecutor(_LOADS, "load")
        self.host: Host[Loaded] = Host(host_bytes, lambda item: item.num_bytes)
        self.slots: Slots[Loaded] = Slots(
            num_pages=engine.encoder.bank.num_pages,
            max_slots=max_slots,
            fetch=self._fetch,
            size=lambda item: item.num_pages,
            write=write,
        )
        self._pinned = Pinned(pinned_tasks, self.slots, self._find)

    async def load_pinned(self) -> None:
        """Bring the pinned tasks into slots; one that cannot be served is logged."""
        await self._pinned.load()

    async def describe(self, task: str) -> Artifact:
        """Read a task's folder as it is now, validate it whole, and keep it in RAM.

        Raises:
            AdapterError: The task is not there, not complete, or refused with all its problems.
        """
        loaded = await self._read(task)
        self.host.put(f"{task}@{loaded.artifact.version}", loaded)
        return loaded.artifact

    async def prefetch(self, tasks: Collection[str]) -> None:
        """Bring tasks into host RAM, one after the other, so that other loads need not wait.

        While rows are answered it takes a share of the time only. A task that cannot be served is
        left for its first request to say so.
        """
        for task in tasks:
            with contextlib.suppress(AdapterError):
                loaded = await self._read(task, rest=self._rest)
                self.host.put(f"{task}@{loaded.artifact.version}", loaded)

    @asynccontextmanager
    async def pin(self, task: str, version: str) -> AsyncIterator[int]:
        """Hold a version in a slot while the block answers its rows; yields the slot.

        Raises:
            AdapterError: The version cannot be had.
        """
        name = f"{task}@{version}"
        self.num_calls += 1
        try:
            async with self.slots.pin(name) as slot:
                await self._pinned.follow(task, name)
                yield slot
        finally:
            self.num_calls -= 1

    async def _rest(self, taken_s: float) -> None:
        """Leave the interpreter to the rows that are answered, after so long a piece of work."""
        if self.num_calls:
            await asyncio.sleep(taken_s * (1 / _PREFETCH_SHARE - 1))

    async def _find(self, task: str) -> str:
        """Bring a task's current version into host RAM and return its name."""
        return f"{task}@{(await self.describe(task)).version}"

    async def _read(
        self, task: str, version: str | None = None, rest: Rest | None = None
    ) -> Loaded:
        """Read and validate a folder off the event loop, so that other rows keep flowing.

        What failed fails again at once, as long as the folder is as it was. `rest` is awaited after
        each piece of the work with the seconds that it took.
        """
        look = await self._off_loop(self.store.look, task)
        with self.failures.remembering(f"{task}@{version or ''}", look):
            try:
                files = await self._piece(rest, self.store.read, task)
                if version is not None and files.version != version:
                    raise AdapterChanged(task, version, files.version)
                artifact = await self._piece(rest, self._engine.validate, files)
                return await self._piece(rest, self._engine.pack, artifact)
            except AdapterRefused as error:
                logger.warning("adapter=%s refused: %s", task, "; ".join(error.problems))
                raise

    async def _piece(self, rest: Rest | None, work: Callable[..., T], *args: Any) -> T:
        started_s = time.perf_counter()
        result = await self._off_loop(work, *args)
        if rest is not None:
            await rest(time.perf_counter() - started_s)
        return result

    async def _fetch(self, name: str) -> Loaded:
        """Return `task@version` from the host's RAM, or read it."""
        task, _, version = name.partition("@")
        return await self.host.get(name, lambda: self._read(task, version))

    async def _off_loop(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._loads, work, *args)
