"""What the catalog does by itself, once a second. No ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from adapters.errors import AdapterRefused
from adapters.store import Store
from deployments.catalog import state
from deployments.catalog.adoption import Adoption
from deployments.catalog.effects import Effects
from deployments.catalog.ledger import Ledger
from deployments.catalog.usage import UsageSums
from deployments.snapshot import Snapshot, TaskRecord

logger = logging.getLogger("ray.serve")

_EVERY_S = 1.0
_SCAN_SHARE = 0.1
# Requests that were on their way to a version when it was deleted still find its files.
_GRACE_S = 5.0
# A staging in which nothing has changed for so long is nobody's, of no cluster on this store.
_DEAD_S = 900.0


class Upkeep:
    """Follows other clusters, ends failing canaries, takes folders in, removes deleted files."""

    def __init__(
        self,
        ledger: Ledger,
        usage: UsageSums,
        store: Store,
        effects: Effects,
        adoption: Adoption,
        *,
        scan_every_s: float = 1.0,
    ) -> None:
        """Take what it looks after, and how often folders are looked for."""
        self._ledger, self._usage = ledger, usage
        self._store, self._effects, self._adoption = store, effects, adoption
        self._scan_every_s = scan_every_s
        self._seen_s: dict[tuple[str, str | None], float] = {}
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin; needs a running event loop."""
        # Apart, since a folder may take minutes to be taken in, and a canary may not.
        for work in (self._watch, self._scan, self._purge):
            self._loops.append(asyncio.ensure_future(_again_and_again(work)))

    def stop(self) -> None:
        """End."""
        for loop in self._loops:
            loop.cancel()

    @property
    def alive(self) -> bool:
        """Whether everything is still looked after."""
        return bool(self._loops) and not any(loop.done() for loop in self._loops)

    async def _watch(self) -> None:
        """Read what other clusters wrote; give failing versions' traffic to the active ones."""
        await self._ledger.refresh()
        for task, version, reason in list(self._usage.failing(self._ledger.snapshot)):

            def back(snapshot: Snapshot, task: str = task, version: str = version) -> Snapshot:
                return state.return_traffic(snapshot, task, version)

            what = {"returned": version, "reason": reason}
            await self._ledger.commit(back, by="guard", task=task, what=what)
            logger.warning("task=%s version=%s lost its traffic: %s", task, version, reason)

    async def _scan(self) -> None:
        """Look for folders, which may take a share of the time only."""
        started_s = time.monotonic()
        await self._adoption.scan()
        taken_s = time.monotonic() - started_s
        await asyncio.sleep(max(self._scan_every_s - _EVERY_S, taken_s / _SCAN_SHARE))

    async def _purge(self) -> None:
        """Remove the files of what was deleted a while ago, then forget it."""
        await _safely(self._clear_unfinished())
        now_s = time.monotonic()
        doomed: list[tuple[str, str | None]] = []
        for task, record in self._ledger.snapshot.tasks.items():
            doomed += [(task, None)] if record.deleted else [(task, v) for v in record.doomed]
        self._seen_s = {gone: self._seen_s.get(gone, now_s) for gone in doomed}
        for (task, version), seen_s in self._seen_s.items():
            if now_s - seen_s >= _GRACE_S:  # each by itself: one that stays must not keep others
                await _safely(self._remove(task, version))

    async def _remove(self, task: str, version: str | None) -> None:
        """Remove a version or a task, if it is still to go and everybody knows."""
        # Another cluster may have removed it, and somebody have published it again.
        record = (await self._ledger.refresh()).tasks.get(task)
        if record is None or not (record.deleted if version is None else version in record.doomed):
            return
        if await self._effects.reach(record.revision):
            return
        if version is None:
            await self._remove_task(task, record)
        else:
            await asyncio.to_thread(self._store.remove, task, version)
        await self._ledger.commit(
            lambda snapshot: state.purged(snapshot, task, version),
            by="upkeep",
            task=task,
            what={"purged": version or "task"},
        )

    async def _remove_task(self, task: str, record: TaskRecord) -> None:
        for one in {*record.versions, *record.doomed}:
            with contextlib.suppress(AdapterRefused):  # of a link, which alone is ours
                await asyncio.to_thread(self._store.remove, task, one)
        if record.folder is not None:  # whoever deleted it died before it was removed
            await asyncio.to_thread(self._store.remove, task, None)

    async def _clear_unfinished(self) -> None:
        """Remove what publications left behind whose process has died."""
        for staging, task, version in await asyncio.to_thread(self._store.unfinished, _DEAD_S):
            record = self._ledger.snapshot.tasks.get(task or "")
            known = () if record is None else (*record.versions, *record.doomed)
            if task is not None and version is not None and version not in known:
                await asyncio.to_thread(self._store.remove, task, version)
            await asyncio.to_thread(self._store.discard, staging)
            logger.warning("staging=%s was left unfinished, and is removed", staging)


async def _again_and_again(work: Callable[[], Awaitable[None]]) -> None:
    while True:
        await _safely(work())
        await asyncio.sleep(_EVERY_S)


async def _safely(work: Awaitable[None]) -> None:
    """Do a piece of work; what goes wrong is tried again a second later."""
    try:
        await work
    except Exception as error:
        logger.error("catalog upkeep: %r", error, exc_info=error)
