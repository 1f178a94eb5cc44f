"""What the catalog does by itself, about once a second. No ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable

from adapters.errors import AdapterRefused
from adapters.store import Store
from deployments.catalog import state
from deployments.catalog.adoption import Adoption
from deployments.catalog.effects import Effects
from deployments.catalog.ledger import Ledger
from deployments.catalog.publication import ensure_there, withdraw
from deployments.catalog.usage import UsageSums
from deployments.snapshot import Snapshot, TaskRecord

logger = logging.getLogger("ray.serve")

_EVERY_S = 1.0
_SCAN_SHARE = 0.2
# Requests that were on their way to a version when it was deleted still find its files.
_GRACE_S = 5.0
# A purger removes nothing any more so long after it was named; after twice that another is.
_PURGE_S = 60.0
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
        scan_every_s: float,
    ) -> None:
        """Take what it looks after, and how often folders are looked for."""
        self._ledger, self._usage = ledger, usage
        self._store, self._effects, self._adoption = store, effects, adoption
        self._scan_every_s = scan_every_s
        self._seen_s: dict[tuple[str, str | None], float] = {}
        self._claims: dict[
            str, tuple[str | None, float]
        ] = {}  # task -> purger, and since when it is
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin; needs a running event loop."""
        # Apart, since a folder may take minutes to be taken in, and a canary may not.
        works = ((self._watch, _EVERY_S), (self._scan, self._scan_every_s), (self._purge, _EVERY_S))
        for work, every_s in works:
            self._loops.append(asyncio.ensure_future(_again_and_again(work, every_s)))

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
        looked_s = await self._adoption.scan()
        await asyncio.sleep(max(0.0, looked_s / _SCAN_SHARE - self._scan_every_s))

    async def _purge(self) -> None:
        """Remove the files of what was deleted a while ago, then forget it."""
        await _safely(self._clear_unfinished())
        now_s = time.monotonic()
        doomed: list[tuple[str, str | None]] = []
        for task, record in self._ledger.snapshot.tasks.items():
            doomed += [(task, None)] if record.deleted else [(task, v) for v in record.doomed]
        self._seen_s = {gone: self._seen_s.get(gone, now_s) for gone in doomed}
        going = {task for task, _ in doomed}
        self._claims = {task: claim for task, claim in self._claims.items() if task in going}
        for (task, version), seen_s in self._seen_s.items():
            if now_s - seen_s >= _GRACE_S:  # each by itself: one that stays must not keep others
                await _safely(self._remove(task, version))

    async def _remove(self, task: str, version: str | None) -> None:
        """Remove a version or a task, if it is still to go, everybody knows, and nobody else does.

        Of two clusters one alone may: what the other forgot a moment ago may be published again.
        """
        record = (await self._ledger.refresh()).tasks.get(task)
        if not state.is_going(record, version) or await self._effects.reach(record.revision):
            return
        gone = version or "task"
        purger, until_s = secrets.token_hex(8), time.monotonic() + _PURGE_S
        instead_of = record.purger if self._may_take_over(task, record.purger) else None
        snapshot = await self._ledger.commit(
            lambda s: state.claim_purge(s, task, version, purger, instead_of),
            by="upkeep",
            task=task,
            what={"purging": gone},
        )
        record = snapshot.tasks.get(task)
        if record is None or record.purger != purger:
            return
        self._claims[task] = (purger, -math.inf)  # ours to take over, if this fails
        if version is None:
            await self._remove_task(task, record, until_s)
        else:
            await self._remove_folder(task, version, until_s)
        await self._ledger.commit(
            lambda s: state.purged(s, task, version, purger),
            by="upkeep",
            task=task,
            what={"purged": gone},
        )

    def _may_take_over(self, task: str, purger: str | None) -> bool:
        """Tell whether who was to remove a task's files has had the time for it twice over."""
        known, since_s = self._claims.get(task, (None, 0.0))
        if known != purger:
            since_s = time.monotonic()
            self._claims[task] = (purger, since_s)
        return time.monotonic() - since_s > 2 * _PURGE_S

    async def _remove_folder(self, task: str, version: str | None, until_s: float) -> None:
        if time.monotonic() > until_s:
            raise TimeoutError(f"the files of {task} took over {_PURGE_S:.0f} s to remove")
        await asyncio.to_thread(self._store.remove, task, version)

    async def _remove_task(self, task: str, record: TaskRecord, until_s: float) -> None:
        for one in {*record.versions, *record.doomed}:
            with contextlib.suppress(AdapterRefused):  # of a link, which alone is ours
                await self._remove_folder(task, one, until_s)
        if record.folder is not None:  # whoever deleted it died before it was removed
            await self._remove_folder(task, None, until_s)

    async def _clear_unfinished(self) -> None:
        """Remove what publications left behind whose process has died."""
        for staging, task, version in await asyncio.to_thread(self._store.unfinished, _DEAD_S):
            if task is not None and version is not None:
                gone = await withdraw(self._ledger, self._store, task, version, staging)
                record = self._ledger.snapshot.tasks.get(task)
                if not gone and record is not None and version in record.versions:
                    await ensure_there(self._store, task, version, staging)
            await asyncio.to_thread(self._store.discard, staging)
            logger.warning("staging=%s was left unfinished, and is removed", staging)


async def _again_and_again(work: Callable[[], Awaitable[None]], every_s: float) -> None:
    while True:
        await _safely(work())
        await asyncio.sleep(every_s)


async def _safely(work: Awaitable[None]) -> None:
    """Do a piece of work; what goes wrong is tried again a little later."""
    try:
        await work
    except Exception as error:
        logger.error("catalog upkeep: %r", error, exc_info=error)
