"""Adapters on their way into slots and out of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Executor

from deployments.model.engine import Engine, Loaded
from deployments.model.health import Health
from deployments.model.news import News

logger = logging.getLogger("ray.serve")


class SlotWrites:
    """Hands adapters over to the device's thread, which works in order. One event loop's."""

    def __init__(self, engine: Engine, device: Executor, news: News, health: Health) -> None:
        """Take the engine, the one thread that works with it, and who is told."""
        self._engine, self._device = engine, device
        self._news, self._health = news, health

    async def write(self, slot: int, loaded: Loaded, gone: Sequence[int]) -> None:
        """Hand an adapter over to a slot, after those that leave.

        It is not waited for. The one thread works in order, so every forward handed over from now
        on finds it there, and its rows join the next batch instead of the one after.
        """
        started_s = time.perf_counter()
        name = f"{loaded.artifact.task}@{loaded.artifact.version}"

        def written(writing: asyncio.Future[None]) -> None:
            if writing.cancelled():
                return
            if writing.exception() is not None:
                # The slot is empty now: rows for it fail, and none is answered by another adapter.
                self._health.lose("the device took no adapter into a slot")
                logger.error("adapter=%s was not written", name, exc_info=writing.exception())
                return
            taken_ms = 1e3 * (time.perf_counter() - started_s)
            size = loaded.num_bytes
            logger.info("adapter=%s to=slot:%d bytes=%d ms=%.1f", name, slot, size, taken_ms)
            if gone:
                logger.info("left=slot:%s", ",".join(map(str, gone)))

        self._news.came(slot, name, gone)
        loop = asyncio.get_running_loop()
        writing = loop.run_in_executor(self._device, self._engine.write, slot, loaded, gone)
        writing.add_done_callback(written)

    def forget(self, slots: Sequence[int]) -> None:
        """Free slots once the rows that were handed over before have been answered."""
        logger.info("left=slot:%s", ",".join(map(str, slots)))
        self._news.left(slots)
        asyncio.get_running_loop().run_in_executor(self._device, self._engine.forget, slots)
