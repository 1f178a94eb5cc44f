"""Changes from the outside: checked, made ready, written, told. No ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from adapters.errors import AdapterError, TaskNotFound
from adapters.store import Store
from deployments.catalog import state
from deployments.catalog.adoption import Adoption
from deployments.catalog.effects import Effects
from deployments.catalog.ledger import Ledger
from deployments.catalog.readiness import checked, make_ready
from deployments.errors import NotReady, Stale
from deployments.snapshot import Snapshot, TaskPatch, TaskRecord

logger = logging.getLogger("ray.serve")

Transition = Callable[[Snapshot], Snapshot]
# A change that nobody guards with If-Match is drafted anew when another one came between.
_TRIES = 8


class Changes:
    """What an administrator may do to tasks and versions. Owned by one event loop.

    Each change is drafted on the newest snapshot; what newly answers is validated, warmed and
    tried; then it is written, unless the task has changed since the draft.
    """

    def __init__(self, ledger: Ledger, store: Store, effects: Effects, adoption: Adoption) -> None:
        """Take what it works with."""
        self._ledger, self._store = ledger, store
        self._effects, self._adoption = effects, adoption

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
        """Make a version of staged files; the first of a task becomes active.

        Raises:
            BadInput: The files cannot be served; with all problems.
            Stale: The task is not as `if_match` says.
            NotReady: No model replica can check them.
        """
        try:
            facts = await checked(self._effects.check(task, staging, {}))
            version = facts["version"]
            await self._adopt_folder(task, by)

            published = False

            async def prepare(record: TaskRecord | None) -> Transition:
                nonlocal published
                if record is not None and (record.deleted or version in record.doomed):
                    what = f"{task}@{version} is being deleted"
                    raise NotReady(f"{what}; try again in a few seconds")
                if not published and (record is None or version not in record.versions):
                    await asyncio.to_thread(self._store.publish, staging, task, version)
                    published = True  # what was staged has moved; a second draft finds it there
                now_s = datetime.now(UTC).timestamp()
                seen = 0 if record is None else record.revision
                return lambda snapshot: state.add_version(
                    snapshot, task, version, source, by, now_s, activate=activate, if_match=seen
                )

            known = self._ledger.snapshot.tasks.get(task)
            created = known is None or version not in known.versions
            what = {"publish": version, "source": source, "activate": activate}
            try:
                record = await self._change(task, prepare, by=by, what=what, if_match=if_match)
            except BaseException:
                await self._withdraw(task, version)
                raise
        finally:
            await asyncio.to_thread(self._store.discard, staging)
        return {**await self._told(task, record), "version": version, "created": created}

    async def patch(
        self, task: str, patch: TaskPatch, *, by: str, if_match: int | None
    ) -> dict[str, Any]:
        """Change what a task does.

        Raises:
            TaskNotFound: There is no such task.
            BadInput: The patch, or a version that would answer, is wrong; with all problems.
            Stale: The task is not as `if_match` says.
        """
        if_match = await self._managed(task, by, if_match)

        async def prepare(record: TaskRecord | None) -> Transition:
            seen = _revision(task, record)
            return lambda snapshot: state.patch(snapshot, task, patch, seen)

        what = patch.model_dump(mode="json", exclude_unset=True)
        return await self._told(
            task, await self._change(task, prepare, by=by, what=what, if_match=if_match)
        )

    async def rollback(self, task: str, *, by: str, if_match: int | None) -> dict[str, Any]:
        """Let the version answer that was active before; its golden answers are not asked for."""
        if_match = await self._managed(task, by, if_match)

        async def prepare(record: TaskRecord | None) -> Transition:
            seen = _revision(task, record)
            return lambda snapshot: state.rollback(snapshot, task, seen)

        return await self._told(
            task,
            await self._change(
                task, prepare, by=by, what={"rollback": True}, if_match=if_match, golden=False
            ),
        )

    async def delete(
        self, task: str, version: str | None, *, by: str, if_match: int | None
    ) -> dict[str, Any]:
        """Delete a version that nobody is answered by, or a task; their files go a little later.

        Raises:
            TaskNotFound: There is no such task.
            VersionNotFound: It has no such version.
            Conflict: The version is in use.
        """
        if version is None:
            return await self._delete_task(task, by, if_match)
        if_match = await self._managed(task, by, if_match)

        async def prepare(record: TaskRecord | None) -> Transition:
            seen = _revision(task, record)
            return lambda snapshot: state.delete_version(snapshot, task, version, seen)

        what = {"delete": version}
        return await self._told(
            task, await self._change(task, prepare, by=by, what=what, if_match=if_match)
        )

    async def _delete_task(self, task: str, by: str, if_match: int | None) -> dict[str, Any]:
        record = self._ledger.snapshot.tasks.get(task)
        if record is None:
            await asyncio.to_thread(self._store.look, task)  # TaskNotFound if there is none
        snapshot = await self._ledger.commit(
            lambda snapshot: state.delete_task(snapshot, task, if_match),
            by=by,
            task=task,
            what={"delete": "task"},
        )
        return await self._told(task, snapshot.tasks[task])

    async def _change(
        self,
        task: str,
        prepare: Callable[[TaskRecord | None], Any],
        *,
        by: str,
        what: dict[str, Any],
        if_match: int | None,
        golden: bool = True,
    ) -> TaskRecord:
        """Draft, make ready and write a change until none came between."""
        for attempt in range(_TRIES):
            snapshot = self._ledger.snapshot
            record = snapshot.tasks.get(task)
            etag = 0 if record is None else record.revision
            if if_match is not None and if_match != etag:
                raise Stale(f"task {task!r} is at etag {etag}, not {if_match}; read it again")
            transition: Transition = await prepare(record)
            draft = transition(snapshot).tasks[task]
            await make_ready(self._effects, task, record, draft, golden=golden)
            try:
                written = await self._ledger.commit(transition, by=by, task=task, what=what)
                return written.tasks[task]
            except Stale:
                if if_match is not None or attempt == _TRIES - 1:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _managed(self, task: str, by: str, if_match: int | None) -> int | None:
        """Make sure that a task is in the catalog; return the etag that the change needs."""
        record = self._ledger.snapshot.tasks.get(task)
        if record is not None:
            return if_match
        if if_match not in (None, 0):
            raise Stale(f"task {task!r} is at etag 0, not {if_match}; read it again")
        record = await checked(self._adoption.adopt(task, by))
        return None if if_match is None else record.revision

    async def _adopt_folder(self, task: str, by: str) -> None:
        """Take in a plain folder that answers, so that an upload beside it does not replace it."""
        if task in self._ledger.snapshot.tasks:
            return
        try:
            await self._adoption.adopt(task, by)
        except TaskNotFound:
            return
        except AdapterError as error:
            logger.warning("adapter=%s its folder is not taken in: %s", task, error)

    async def _withdraw(self, task: str, version: str) -> None:
        """Leave nothing of a publication that was not written."""
        snapshot = await self._ledger.refresh()
        record = snapshot.tasks.get(task)
        if record is None or version not in (*record.versions, *record.doomed):
            await asyncio.to_thread(self._store.remove, task, version)

    async def _told(self, task: str, record: TaskRecord) -> dict[str, Any]:
        """Wait until everybody knows, and say who does not."""
        waiting_for = await self._effects.reach(record.revision)
        return {
            "task": task,
            "revision": record.revision,
            "etag": record.revision,
            "everywhere": not waiting_for,
        }


def _revision(task: str, record: TaskRecord | None) -> int:
    if record is None:
        raise TaskNotFound(task)
    return record.revision
