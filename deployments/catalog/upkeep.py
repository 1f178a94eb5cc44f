"""What the catalog does by itself, once a second. No ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from adapters.errors import AdapterRefused
from adapters.store import Store
from deployments.catalog import state
from deployments.catalog.adoption import Adoption
from deployments.catalog.ledger import Ledger
from deployments.catalog.usage import UsageSums
from deployments.snapshot import Snapshot

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
        adoption: Adoption,
        *,
        scan_every_s: float = 1.0,
    ) -> None:
        """Take what it looks after, and how often folders are looked for."""
        self._scan_every_s = scan_every_s
        self._ledger, self._usage = ledger, usage
        self._store, self._adoption = store, adoption
        self._seen_s: dict[tuple[str, str | None], float] = {}
        self._next_scan_s = 0.0
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; needs a running event loop."""
        self._loop = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        """End."""
        if self._loop is not None:
            self._loop.cancel()

    @property
    def alive(self) -> bool:
        """Whether anything is still looked after."""
        return self._loop is not None and not self._loop.done()

    async def _run(self) -> None:
        while True:
            await self._safely(self._clear_unfinished())
            await self._safely(self._ledger.refresh())
            await self._safely(self._end_failing())
            await self._safely(self._scan())
            await self._safely(self._purge())
            await asyncio.sleep(_EVERY_S)

    async def _safely(self, work: object) -> None:
        """Do a piece of work; what goes wrong is tried again a second later."""
        try:
            await work  # type: ignore[misc]
        except Exception as error:
            logger.error("catalog upkeep: %r", error, exc_info=error)

    async def _scan(self) -> None:
        """Look for folders, which may take a share of the time only."""
        started_s = time.monotonic()
        if started_s >= self._next_scan_s:
            await self._adoption.scan()
            ended_s = time.monotonic()
            rest_s = max(self._scan_every_s - _EVERY_S, (ended_s - started_s) / _SCAN_SHARE)
            self._next_scan_s = ended_s + rest_s

    async def _end_failing(self) -> None:
        """Give the traffic of versions that fail too often back to the active one."""
        for task, version, reason in list(self._usage.failing(self._ledger.snapshot)):

            def back(snapshot: Snapshot, task: str = task, version: str = version) -> Snapshot:
                return state.return_traffic(snapshot, task, version)

            what = {"returned": version, "reason": reason}
            await self._ledger.commit(back, by="guard", task=task, what=what)
            logger.warning("task=%s version=%s lost its traffic: %s", task, version, reason)

    async def _purge(self) -> None:
        """Remove the files of what was deleted a while ago, then forget it."""
        now_s = time.monotonic()
        doomed: list[tuple[str, str | None]] = []
        for task, record in self._ledger.snapshot.tasks.items():
            doomed += [(task, None)] if record.deleted else [(task, v) for v in record.doomed]
        self._seen_s = {gone: self._seen_s.get(gone, now_s) for gone in doomed}
        for (task, version), seen_s in self._seen_s.items():
            if now_s - seen_s >= _GRACE_S:  # each by itself: one that stays must not keep others
                await self._safely(self._remove(task, version))

    async def _remove(self, task: str, version: str | None) -> None:
        record = self._ledger.snapshot.tasks[task]
        if version is not None:
            await asyncio.to_thread(self._store.remove, task, version)
        else:
            found = await asyncio.to_thread(self._store.versions, task)
            for one in {*record.versions, *record.doomed, *found}:
                with contextlib.suppress(AdapterRefused):  # of a link, which alone is ours
                    await asyncio.to_thread(self._store.remove, task, one)
            await asyncio.to_thread(self._store.remove, task, None)
        await self._ledger.commit(
            lambda snapshot: state.purged(snapshot, task, version),
            by="upkeep",
            task=task,
            what={"purged": version or "task"},
        )

    async def _clear_unfinished(self) -> None:
        """Remove what publications left behind whose process has died."""
        for staging, task, version in await asyncio.to_thread(self._store.unfinished, _DEAD_S):
            record = self._ledger.snapshot.tasks.get(task or "")
            known = () if record is None else (*record.versions, *record.doomed)
            if task is not None and version is not None and version not in known:
                await asyncio.to_thread(self._store.remove, task, version)
            await asyncio.to_thread(self._store.discard, staging)
            logger.warning("staging=%s was left unfinished, and is removed", staging)
