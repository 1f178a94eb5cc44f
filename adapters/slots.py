"""Who is in the bank: pins, and the least recently used first out. No torch."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from adapters.errors import BankFull

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Seat:
    slot: int
    num_pages: int


class Slots(Generic[T]):
    """Gives versions slots and pages of the bank; slot 0 is never given.

    Owned by one event loop, which is why there are no locks. A version becomes visible in its slot
    only when its load has ended, nobody leaves before the newcomer is in RAM, and a pinned slot is
    never given away.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        max_slots: int | None,
        fetch: Callable[[str], Awaitable[T]],
        size: Callable[[T], int],
        write: Callable[[int, T, Sequence[int]], Awaitable[None]],
        forget: Callable[[Sequence[int]], None],
    ) -> None:
        """Take the measures of the bank, and what fills it. What is awaited may raise to the pins.

        Args:
            num_pages: Pages for all residents.
            max_slots: Most residents, None for as many as the pages hold.
            fetch: Awaited with a version to have it in RAM.
            size: Tells how many pages an item takes.
            write: Awaited with (slot, item, slots whose residents leave first); what it does must
                happen in the order of the calls.
            forget: Called with slots whose residents have left without a newcomer; likewise.
        """
        self._num_pages = num_pages
        self._max_slots = max_slots
        self._fetch, self._size, self._write, self._forget = fetch, size, write, forget
        self._free_pages = num_pages
        self._free_slots: list[int] = []
        self._last_slot = 0
        self._left: list[int] = []  # slots of those who left, of which the bank is yet to hear
        self._seats: OrderedDict[str, _Seat] = OrderedDict()  # least recently used first
        # Calls that hold a version or wait for it, and those that hold a slot. A version that is
        # wanted and not held has just been loaded, and those who waited for it are waking up.
        self._wanted: Counter[str] = Counter()
        self._held: Counter[int] = Counter()
        self._kept: set[str] = set()
        self._dropped: set[str] = set()  # versions that leave when nobody wants them any more
        self._emptying: dict[int, int] = {}  # slot that is free once nobody holds it -> its pages
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()

    @property
    def resident(self) -> dict[str, int]:
        """Version -> slot of all that could be answered now."""
        return {version: seat.slot for version, seat in self._seats.items()}

    @property
    def pages_free(self) -> int:
        """Pages that a newcomer could have without anybody leaving."""
        return self._free_pages

    @property
    def slots_free(self) -> int | None:
        """Slots that newcomers could have likewise; None if only the pages limit them."""
        if self._max_slots is None:
            return None
        return max(0, self._max_slots - self._num_taken)

    def resize(self, max_slots: int | None) -> None:
        """Change how many may be resident; who is too many leaves when the next one comes."""
        self._max_slots = max_slots
        self._changed.set()

    async def keep(self, version: str) -> None:
        """Load a version, and let it stay until `let_go`.

        Raises:
            BankFull: What is kept already leaves no room for it.
        """
        self._kept.add(version)
        self._dropped.discard(version)
        try:
            async with self.pin(version):
                pass
        except BaseException:
            self._kept.discard(version)
            raise

    def let_go(self, version: str) -> None:
        """Let a version leave again when others need its place; it need not have been kept."""
        self._kept.discard(version)
        self._changed.set()

    def drop(self, version: str) -> None:
        """Let a version leave now, or when the last call that holds it ends; it need not be here.

        A later pin finds it gone and loads it anew. Those who wait for its load still get it.
        """
        self._kept.discard(version)
        self._dropped.discard(version)
        seat = self._seats.get(version)
        if seat is not None and (self._held[seat.slot] or version not in self._wanted):
            del self._seats[version]
            self._emptying[seat.slot] = seat.num_pages
            self._empty(seat.slot)
        elif version in self._wanted or version in self._loading:
            self._dropped.add(version)  # it loads, or has just been loaded for those who wait
        self._changed.set()

    @asynccontextmanager
    async def pin(self, version: str) -> AsyncIterator[int]:
        """Hold a version in a slot for as long as the block runs; yields the slot.

        Waits while the version loads, and while others hold what it needs; none waits for ever.
        Many pins of a cold version share one load, which goes on if the first of them is cancelled.

        Raises:
            BankFull: The versions that are kept leave no room for it.
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
            slot = self._seats[version].slot
            self._seats.move_to_end(version)
            self._held[slot] += 1
            self._changed.set()
            try:
                yield slot
            finally:
                self._held[slot] -= 1
                self._empty(slot)
        finally:
            self._wanted[version] -= 1
            if not self._wanted[version]:
                del self._wanted[version]
                if version in self._dropped:
                    self.drop(version)
            self._changed.set()

    def _empty(self, slot: int) -> None:
        """Free a slot that was dropped, once nobody holds it."""
        if slot in self._emptying and not self._held[slot]:
            self._free_pages += self._emptying.pop(slot)
            self._free_slots.append(slot)
            left, self._left = self._left, []
            self._forget([*left, slot])

    async def _bring(self, version: str) -> None:
        try:
            item = await self._fetch(version)
            num_pages = self._size(item)
            # One at a time: of two that wait for room, each could else hold half of it.
            async with self._turn:
                await self._make_room(version, num_pages)
                slot = self._free_slots.pop() if self._free_slots else self._next_slot()
                self._free_pages -= num_pages
            left, self._left = self._left, []
            try:
                await self._write(slot, item, left)
            except BaseException:
                self._free_slots.append(slot)
                self._free_pages += num_pages
                raise
            self._seats[version] = _Seat(slot, num_pages)
        finally:
            # Here and not in a callback, which runs later: a seat may be taken again before it, and
            # a pin that then found this load, done, would spin.
            del self._loading[version]
            if version in self._dropped and version not in self._wanted:
                self.drop(version)
            self._changed.set()

    async def _make_room(self, version: str, num_pages: int) -> None:
        """Let the least recently used go until a newcomer fits."""
        while not self._fits(num_pages):
            kept = [seat for v, seat in self._seats.items() if v in self._kept]
            room = self._num_pages - sum(seat.num_pages for seat in kept)
            is_full = self._max_slots is not None and len(kept) >= self._max_slots
            if num_pages > room or is_full:
                raise BankFull(version, len(kept))
            leaving = self._next_to_leave()
            if leaving is None:
                await self._change()
                continue
            seat = self._seats.pop(leaving)
            # If it is held: new rows for it must come back by a load, behind us. Under a steady
            # stream of them it would never be idle, and no other would ever get in.
            while self._held[seat.slot]:
                await self._change()
            self._free_pages += seat.num_pages
            self._free_slots.append(seat.slot)
            self._left.append(seat.slot)

    def _fits(self, num_pages: int) -> bool:
        has_slot = self._max_slots is None or self._num_taken < self._max_slots
        return has_slot and num_pages <= self._free_pages

    @property
    def _num_taken(self) -> int:
        return self._last_slot - len(self._free_slots)

    def _next_slot(self) -> int:
        self._last_slot += 1
        return self._last_slot

    def _next_to_leave(self) -> str | None:
        """Return the least recently used of those that nobody holds, else of those held."""
        may_leave = [version for version in self._seats if version not in self._kept]
        idle = next((v for v in may_leave if v not in self._wanted), None)
        return idle or next((v for v in may_leave if self._held[self._seats[v].slot]), None)

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def _seen(task: asyncio.Task[None]) -> None:
    """Look at what a load raised, so that one that nobody waits for is no warning."""
    if not task.cancelled():
        task.exception()
