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
        # Calls that hold a version or wait for it, and those that hold a slot. A version that is
        # wanted and not held has just been loaded, and those who waited for it are waking up.
        self._wanted: Counter[str] = Counter()
        self._held: Counter[int] = Counter()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    @property
    def resident(self) -> dict[str, int]:
        """Version -> slot of all that could be answered now."""
        return dict(self._seats)

    @asynccontextmanager
    async def pin(self, version: str) -> AsyncIterator[int]:
        """Hold a version in a slot for as long as the block runs; yields the slot.

        Waits while the version loads, and while every slot is held by others; none waits for ever.
        Many pins of a cold version share one load, which goes on if the first of them is cancelled.
        """
        self._wanted[version] += 1
        try:
            while version not in self._seats:
                task = self._loading.get(version)
                if task is None:
                    task = asyncio.get_running_loop().create_task(self._bring(version))
                    self._loading[version] = task
                    task.add_done_callback(_seen)
                await asyncio.shield(task)
            slot = self._seats[version]
            self._seats.move_to_end(version)
            self._held[slot] += 1
            self._changed.set()
            try:
                yield slot
            finally:
                self._held[slot] -= 1
        finally:
            self._wanted[version] -= 1
            if not self._wanted[version]:
                del self._wanted[version]
            self._changed.set()

    async def _bring(self, version: str) -> None:
        try:
            slot = await self._take()
            try:
                await self._load(version, slot)
            except BaseException:
                self._free.append(slot)
                raise
            self._seats[version] = slot
        finally:
            # Here and not in a callback, which runs later: a seat may be taken again before it, and
            # a pin that then found this load, done, would spin.
            del self._loading[version]
            self._changed.set()

    async def _take(self) -> int:
        """Return a free slot, or that of the least recently used version."""
        while not self._free:
            idle = next((v for v in self._seats if v not in self._wanted), None)
            if idle is not None:
                return self._seats.pop(idle)
            busy = next((v for v, slot in self._seats.items() if self._held[slot]), None)
            if busy is not None:
                # New rows for it must come back by a load, behind us: under a steady stream of
                # them it would never be idle, and no other version would ever get in.
                slot = self._seats.pop(busy)
                while self._held[slot]:
                    await self._change()
                return slot
            await self._change()
        return self._free.pop()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def _seen(task: asyncio.Task[None]) -> None:
    """Look at what a load raised, so that one that nobody waits for is no warning."""
    if not task.cancelled():
        task.exception()
