"""The host RAM tier: loaded adapters under a byte budget, each loaded once. No torch."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from typing import Generic, TypeVar

T = TypeVar("T")


class Host(Generic[T]):
    """An LRU of loaded adapters by version, with single-flight loads.

    Owned by one event loop, hence no locks. The newcomer is in RAM before anything is evicted. What
    a load raises is for `adapters.failures.Failures` to remember.
    """

    def __init__(self, max_bytes: int, num_bytes: Callable[[T], int]) -> None:
        """Take the budget in bytes, and what tells an item's size."""
        self._max_bytes = max_bytes
        self._size = num_bytes
        self._items: OrderedDict[str, T] = OrderedDict()  # least recently used first
        self._loading: dict[str, asyncio.Task[T]] = {}
        self.used_bytes = 0

    def put(self, version: str, item: T) -> None:
        """Keep an item, and let the least recently used go until the budget holds.

        An item over the whole budget is not kept: for its sake everybody else would have to go.
        """
        old = self._items.pop(version, None)
        self.used_bytes -= self._size(old) if old is not None else 0
        if self._size(item) > self._max_bytes:
            return
        self.used_bytes += self._size(item)
        self._items[version] = item
        self.resize(self._max_bytes)

    def resize(self, max_bytes: int) -> None:
        """Change the budget, and let the least recently used go until it holds."""
        self._max_bytes = max_bytes
        while self.used_bytes > self._max_bytes:
            _, gone = self._items.popitem(last=False)
            self.used_bytes -= self._size(gone)

    @property
    def versions(self) -> Collection[str]:
        """What is here."""
        return self._items.keys()

    def drop(self, version: str) -> None:
        """Let an item go; it need not be here. One that is being loaded will not be kept."""
        gone = self._items.pop(version, None)
        self.used_bytes -= self._size(gone) if gone is not None else 0
        self._loading.pop(version, None)

    def peek(self, version: str) -> T | None:
        """Return an item if it is here."""
        if version in self._items:
            self._items.move_to_end(version)
        return self._items.get(version)

    async def get(self, version: str, load: Callable[[], Awaitable[T]]) -> T:
        """Return an item, loading it first if it is not here.

        Calls for the same version share one load; it goes on if a caller is cancelled. What the
        load raises is raised to all that waited for it.
        """
        item = self.peek(version)
        if item is not None:
            return item
        task = self._loading.get(version)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._bring(version, load))
            self._loading[version] = task
            task.add_done_callback(lambda done: self._loaded(version, done))
        return await asyncio.shield(task)

    async def _bring(self, version: str, load: Callable[[], Awaitable[T]]) -> T:
        item = await load()
        if self._loading.get(version) is asyncio.current_task():  # else it was dropped meanwhile
            self.put(version, item)
        return item

    def _loaded(self, version: str, task: asyncio.Task[T]) -> None:
        if self._loading.get(version) is task:
            del self._loading[version]
        if not task.cancelled():
            task.exception()  # seen here, so that a load that nobody waits for is no warning
