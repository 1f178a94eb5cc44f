"""Who sits in which row of the bank: pins, least recently used first out. No torch."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

Load = Callable[[str, int], Awaitable[None]]


class Slots:
    """Gives versions to slots 1…n-1; slot 0 is the zero adapter and never given.

    Owned by one event loop, which is why there are no locks. A version becomes visible in its slot
    only when its load has ended, and a pinned slot is never given away.
    """

    def __init__(self, num_slots: int, load: Load) -> None:
        """Take the number of bank rows, and what fills one.

        Args:
            num_slots: Rows of the bank, slot 0 included; at least 2.
            load: Awaited with (version, slot) to bring a version into a slot. What it raises is
                raised by every `pin` that waited for that version.
        """
        if num_slots < 2:
            raise ValueError(f"a bank needs at least 2 slots, not {num_slots}: slot 0 is reserved")
        self._load = load
        self._free = list(range(num_slots - 1, 0, -1))
        self._seats: OrderedDict[str, int] = OrderedDict()  # least recently used first
        # Calls that hold a version or wait for it: counted from the start, so that a version that
        # has just been loaded is not evicted before those who waited for it have woken up.
        self._pins: Counter[str] = Counter()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._unpinned = asyncio.Event()

    @property
    def resident(self) -> dict[str, int]:
        """Version -> slot of all that could be answered now."""
        return dict(self._seats)

    @asynccontextmanager
    async def pin(self, version: str) -> AsyncIterator[int]:
        """Hold a version in a slot for as long as the block runs; yields the slot.

        Waits while the version loads, and while every slot is pinned by others. Many pins of a
        cold version share one load, which goes on if the first of them is cancelled.
        """
        self._pins[version] += 1
        try:
            while version not in self._seats:
                task = self._loading.get(version)
                if task is None:
                    task = asyncio.get_running_loop().create_task(self._bring(version))
                    self._loading[version] = task
                    task.add_done_callback(lambda done: self._loaded(version, done))
                await asyncio.shield(task)
            self._seats.move_to_end(version)
            yield self._seats[version]
        finally:
            self._pins[version] -= 1
            if not self._pins[version]:
                del self._pins[version]
                self._unpinned.set()

    def _loaded(self, version: str, task: asyncio.Task[None]) -> None:
        del self._loading[version]
        if not task.cancelled():
            task.exception()  # seen here, so that a load that nobody waits for is no warning

    async def _bring(self, version: str) -> None:
        slot = await self._take()
        try:
            await self._load(version, slot)
        except BaseException:
            self._free.append(slot)
            self._unpinned.set()
            raise
        self._seats[version] = slot

    async def _take(self) -> int:
        """Return a free slot, or that of the least recently used version that nobody pins."""
        while not self._free:
            victim = next((v for v in self._seats if v not in self._pins), None)
            if victim is not None:
                return self._seats.pop(victim)
            self._unpinned.clear()
            await self._unpinned.wait()
        return self._free.pop()
