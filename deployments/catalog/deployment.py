"""The Ray Serve deployment that alone writes what tasks exist. One replica."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from ray.serve.handle import DeploymentHandle

from adapters.documents import open_documents
from adapters.errors import TASK_NAME, TaskNotFound
from adapters.store import local_folder
from deployments.catalog.adoption import Adoption
from deployments.catalog.changes import Changes
from deployments.catalog.handles import Others
from deployments.catalog.ledger import Ledger
from deployments.catalog.upkeep import Upkeep
from deployments.catalog.usage import UsageSums
from deployments.catalog.writer import Writer
from deployments.config import Args
from deployments.snapshot import TaskPatch
from deployments.usage import USAGES
from deployments.watch import POLL_S

# How often is looked for what people put into the store by hand. Two looks that found the same take
# it in: on a disk within two seconds. A bucket is listed whole for that.
_LOOK_EVERY_S = 0.75
_LIST_EVERY_S = 10.0


class Catalog:
    """Which tasks exist, which version answers each, and the only hand that changes it."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, model: DeploymentHandle[Any], args: Args
    ) -> None:
        """Read what is true from the store; nothing in memory is the only copy of anything."""
        store = args.open_store()
        writer = Writer(open_documents(args.adapter_store))
        await asyncio.to_thread(writer.refresh)
        self._running: set[asyncio.Future[dict[str, Any]]] = set()
        self._usage = UsageSums()
        self._ledger = Ledger(writer, self._usage)
        self._others = Others(model)
        adoption = Adoption(self._ledger, store, self._others)
        self._changes = Changes(self._ledger, store, self._others, adoption)
        on_disk = local_folder(args.adapter_store) is not None
        self._upkeep = Upkeep(
            self._ledger,
            self._usage,
            store,
            self._others,
            adoption,
            scan_every_s=_LOOK_EVERY_S if on_disk else _LIST_EVERY_S,
        )
        self._upkeep.start()

    async def poll(
        self, revision: int, after: str = "", ingress: str | None = None
    ) -> dict[str, Any]:
        """Tell a watcher what is newer than it holds; see `deployments.catalog.feed.Feed.page`.

        Args:
            revision: What it holds.
            after: As there.
            ingress: Its replica id if it is an ingress, which changes wait for.
        """
        if ingress is not None:
            self._others.ingresses.hold(ingress, revision)
        return await self._ledger.feed.page(revision, after, POLL_S)

    async def publish(
        self,
        task: str,
        staging: str,
        *,
        source: str,
        by: str,
        activate: bool,
        if_match: int | None,
    ) -> dict[str, Any]:
        """Make a version of what an ingress has staged; see `catalog.changes.Changes`."""
        change = self._changes.publish(
            task, staging, source=source, by=by, activate=activate, if_match=if_match
        )
        return await self._to_its_end(change)

    async def patch(
        self, task: str, patch: dict[str, Any], *, by: str, if_match: int | None
    ) -> dict[str, Any]:
        """Change what a task does; `patch` is a `deployments.snapshot.TaskPatch` as plain data."""
        changed = TaskPatch.model_validate(patch)
        return await self._to_its_end(self._changes.patch(task, changed, by=by, if_match=if_match))

    async def rollback(self, task: str, *, by: str, if_match: int | None) -> dict[str, Any]:
        """Let the version answer that was active before."""
        return await self._to_its_end(self._changes.rollback(task, by=by, if_match=if_match))

    async def delete(
        self, task: str, version: str | None, *, by: str, if_match: int | None
    ) -> dict[str, Any]:
        """Delete a version, or with None the task."""
        return await self._to_its_end(self._changes.delete(task, version, by=by, if_match=if_match))

    async def revision(self, revision: int) -> dict[str, Any]:
        """Tell whether every live ingress holds a revision."""
        waiting_for = await self._others.reach(revision, wait_s=0.5)
        return {
            "revision": revision,
            "everywhere": not waiting_for,
            "waiting_for": waiting_for,
        }

    async def history(
        self, task: str | None, before: int | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        """Return changes, the latest first: who, when, what; and whether there are earlier ones."""
        if task is not None and not TASK_NAME.fullmatch(task):
            raise TaskNotFound(task)
        return await self._ledger.history(task=task, before=before, limit=limit)

    async def report(self, counted: list[dict[str, Any]]) -> None:
        """Take what an ingress counted since it last told."""
        self._usage.add(USAGES.validate_python(counted), self._ledger.snapshot)

    async def usage(self, tasks: list[str]) -> dict[str, Any]:
        """Return what was counted of some tasks, by version."""
        return {task: self._usage.of(task) for task in tasks}

    async def _to_its_end(self, change: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
        """Make a change whole, also when the caller goes away, whose calls Serve cancels."""
        running = asyncio.ensure_future(change)
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return await asyncio.shield(running)

    async def check_health(self) -> None:
        """Raise if nothing is looked after any more, so that Serve replaces this replica."""
        if not self._upkeep.alive:
            raise RuntimeError("the catalog's upkeep has ended")

    async def __del__(self) -> None:
        """End the polls that wait; Ray Serve awaits this when the replica stops."""
        self._upkeep.stop()
        await self._ledger.feed.close()
