"""The adapters of one replica: in RAM, in slots, and gone again. Knows no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from adapters.artifact import Artifact
from adapters.errors import AdapterError, AdapterIncomplete
from adapters.host import Host
from adapters.pinned import Pinned
from adapters.slots import Slots
from adapters.store import Store
from deployments.model.engine import Engine, Loaded
from deployments.model.reader import Held, Reader
from deployments.snapshot import Snapshot, TaskRecord

logger = logging.getLogger("ray.serve")
# Of the time while rows are answered, how much prefetching may take.
_PREFETCH_SHARE = 0.1


class Residents:
    """Which adapters a replica has, and where: store, host RAM, slot. Owned by one event loop.

    What goes into a slot is named `task@version`. A version's rules have no part in that: whoever
    asks for it has been told them by `describe`, with those of the catalog laid over its own.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        *,
        host_bytes: int,
        max_slots: int | None,
        pinned_tasks: Collection[str],
        write: Callable[[int, Loaded, Sequence[int]], Awaitable[None]],
        forget: Callable[[Sequence[int]], None],
    ) -> None:
        """Take what reads adapters, and where they are; `load_pinned` comes next.

        Args:
            engine: Validates and packs; only `write` and `forget` touch its slots.
            store: Where adapters lie.
            host_bytes: RAM for those that wait for a slot.
            max_slots: As in `adapters.slots.Slots`.
            pinned_tasks: Tasks that never leave their slots.
            write: As in `adapters.slots.Slots`.
            forget: Likewise.
        """
        self.reader = Reader(engine, store)
        self.num_calls = 0
        self._pinned_tasks = frozenset(pinned_tasks)
        self._snapshot = Snapshot()
        self._background: set[asyncio.Future[Any]] = set()
        self.host: Host[Held] = Host(host_bytes, lambda held: held.loaded.num_bytes)
        self.slots: Slots[Loaded] = Slots(
            num_pages=engine.encoder.bank.num_pages,
            max_slots=max_slots,
            fetch=self._fetch,
            size=lambda loaded: loaded.num_pages,
            write=write,
            forget=forget,
        )
        self._pinned = Pinned(pinned_tasks, self.slots, self._find)

    async def load_pinned(self) -> None:
        """Bring all that is pinned into slots; what cannot be served is logged."""
        await self._pinned.load()

    async def describe(
        self, task: str, version: str | None = None, rules: Mapping[str, Any] | None = None
    ) -> Artifact:
        """Read an adapter as it is now, validate it whole, and keep it in RAM.

        Args:
            task: The task.
            version: The version; None for what its plain folder holds. A version that is in RAM
                is not read again as long as its folder is as it was.
            rules: Laid over its own.

        Raises:
            AdapterError: It is not there, not complete, or refused with all its problems.
        """
        if version is None:
            return self._hold(await self.reader.read(task, rules=rules or {}))
        with self._passing(task, version):
            held = await self._held(task, version)
        return await self.reader.under_rules(held, rules or {})

    async def warm(self, task: str, *versions: str) -> None:
        """Bring versions into slots; several so that all are there at once, and could be pinned.

        Raises:
            AdapterError: One of them cannot be had, or they do not fit together.
        """
        with contextlib.ExitStack() as passing:
            for version in versions:
                passing.enter_context(self._passing(task, version))
            await self.slots.seat([f"{task}@{version}" for version in versions])

    def hot(self, limit: int) -> list[str]:
        """Return `task@version` of the residents that were asked for last, the latest first."""
        return list(reversed(self.slots.resident))[:limit]

    async def prefetch(self, tasks: Collection[str]) -> None:
        """Bring tasks into host RAM, one after the other, so that other loads need not wait.

        While rows are answered it takes a share of the time only. A task that cannot be served is
        left for its first request to say so.
        """
        for task in tasks:
            with contextlib.suppress(AdapterError):
                self._hold(await self.reader.read(task, rules={}, rest=self._rest))

    @asynccontextmanager
    async def pin(self, task: str, version: str) -> AsyncIterator[int]:
        """Hold a version in a slot while the block answers its rows; yields the slot.

        Raises:
            AdapterError: The version cannot be had.
        """
        name = f"{task}@{version}"
        self.num_calls += 1
        try:
            with self._passing(task, version):
                async with self.slots.pin(name) as slot:
                    await self._pinned.answered(task, name)
                    yield slot
        finally:
            self.num_calls -= 1

    async def follow(self, old: Snapshot, new: Snapshot) -> None:
        """Go from one snapshot of the catalog to a newer one; raises nothing.

        Versions that are gone are forgotten when this returns, but for rows that are being
        answered. What is pinned is on its way into slots, and loads longer if it must.
        """
        self._snapshot = new
        tasks = [task for task, record in new.tasks.items() if old.tasks.get(task) is not record]
        tasks += [task for task in old.tasks if task not in new.tasks]
        gone = []
        for task in tasks:
            before, record = old.tasks.get(task), new.tasks.get(task)
            self._pinned.say(task, self._to_pin(task, record))
            gone += [(task, version) for version in self._gone(task, before, record)]
        for task, version in gone:
            self._drop(task, version)
            logger.info("adapter=%s@%s deleted", task, version)
        self._later(self._pinned.bring([task for task in tasks if task in new.tasks]))
        await asyncio.gather(*(self._forget_on_disk(*of) for of in gone))

    async def forget(self, task: str, version: str) -> None:
        """Let go of a version in all places; rows that are being answered are answered first."""
        self._drop(task, version)
        await self._forget_on_disk(task, version)

    async def residency(self, after: str, limit: int) -> dict[str, Any]:
        """Say where versions are, ordered by name.

        Args:
            after: `task@version`; only those after it.
            limit: Most versions to return.

        Returns:
            `slots_free` (None if only pages limit them), `pages_free`, `next` (for `after`; None
            at the end) and `versions`: of each task, version (None if it is not known which failed)
            and `where`, the best place: slot, host, disk; or failed, with `until_s`, in so many
            seconds it is tried again, and `reason`.
        """
        failed = {name: (error, left_s) for name, error, left_s in self.reader.failures.holding()}
        places = dict.fromkeys(
            (
                f"{task}@{version}"
                for task, version in await asyncio.to_thread(self.reader.store.on_disk)
            ),
            "disk",
        )
        places |= dict.fromkeys(failed, "failed")
        places |= dict.fromkeys(self.host.versions, "host")
        places |= dict.fromkeys(self.slots.resident, "slot")
        names = sorted(name for name in places if name > after)
        versions: list[dict[str, Any]] = []
        for name in names[:limit]:
            task, _, version = name.partition("@")
            entry: dict[str, Any] = {"task": task, "version": version or None}
            entry["where"] = places[name]
            if places[name] == "failed":
                error, left_s = failed[name]
                entry |= {"until_s": round(left_s, 3), "reason": str(error)}
            versions.append(entry)
        return {
            "slots_free": self.slots.slots_free,
            "pages_free": self.slots.pages_free,
            "versions": versions,
            "next": names[limit - 1] if len(names) > limit else None,
        }

    def _to_pin(self, task: str, record: TaskRecord | None) -> list[str] | None:
        """Return what the catalog wants pinned of a task, None if it says nothing of it."""
        if record is None:
            return None
        pinned = (record.pinned or task in self._pinned_tasks) and not record.deleted
        return [f"{task}@{version}" for version in record.answering] if pinned else []

    def _gone(self, task: str, old: TaskRecord | None, new: TaskRecord | None) -> set[str]:
        """Return versions of a task that are deleted, whether their files are or not."""
        records = [record for record in (old, new) if record is not None]
        known = {v for record in records for v in (*record.versions, *record.doomed)}
        if new is not None and new.deleted:
            names = {*self.slots.resident, *self.host.versions}
            return known | {name.partition("@")[2] for name in names if name.startswith(f"{task}@")}
        return known - (new.versions.keys() - set(new.doomed) if new is not None else set())

    @contextmanager
    def _passing(self, task: str, version: str) -> Iterator[None]:
        """Forget a version after the block if it was deleted before: its files may not be yet."""
        try:
            yield
        finally:
            record = self._snapshot.tasks.get(task)
            if record is not None and (record.deleted or version in record.doomed):
                self._drop(task, version)
                self._later(self._forget_on_disk(task, version))

    def _drop(self, task: str, version: str) -> None:
        """Forget a version, in its slot as soon as no row needs it there."""
        name = f"{task}@{version}"
        self.slots.drop(name)
        self.host.drop(name)
        for failed in (name, f"{task}@"):
            self.reader.failures.forget(failed)

    async def _forget_on_disk(self, task: str, version: str) -> None:
        # Not in the pool of loads, of which each may wait for a slow store.
        try:
            await asyncio.to_thread(self.reader.store.forget, task, version)
        except Exception as error:  # the cache's own limit will see to it
            logger.warning("adapter=%s@%s stays on disk: %s", task, version, error)

    def _later(self, work: Coroutine[Any, Any, Any]) -> None:
        """Go on with something that must not hold up the caller."""
        running = asyncio.ensure_future(work)
        self._background.add(running)
        running.add_done_callback(self._background.discard)

    async def _rest(self, taken_s: float) -> None:
        """Leave the interpreter to the rows that are answered, after so long a piece of work."""
        if self.num_calls:
            await asyncio.sleep(taken_s * (1 / _PREFETCH_SHARE - 1))

    async def _find(self, task: str) -> str:
        """Bring a task's current version into host RAM and return its name."""
        return f"{task}@{(await self.describe(task)).version}"

    async def _fetch(self, name: str) -> Loaded:
        """Return `task@version` from the host's RAM, or read it."""
        task, _, version = name.partition("@")
        return (await self.host.get(name, lambda: self.reader.read(task, version))).loaded

    def _hold(self, held: Held) -> Artifact:
        artifact = held.loaded.artifact
        self.host.put(f"{artifact.task}@{artifact.version}", held)
        return artifact

    async def _held(self, task: str, version: str) -> Held:
        """Return a version from the host's RAM if its folder is as it was, else read it."""
        name = f"{task}@{version}"
        held = self.host.peek(name)
        if held is not None:
            with contextlib.suppress(AdapterIncomplete):  # a store that is away changes nothing
                if held.look != await self.reader.look(task, version):
                    self.host.drop(name)
        return await self.host.get(name, lambda: self.reader.read(task, version))
