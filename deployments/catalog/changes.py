"""Changes from the outside: checked, made ready, written, told. No ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from adapters.errors import AdapterError, AdapterRefused, TaskNotFound
from adapters.store import Store
from deployments.catalog import state
from deployments.catalog.adoption import Adoption, Found
from deployments.catalog.effects import Effects
from deployments.catalog.ledger import Ledger
from deployments.catalog.publication import Folders, discard, give_way
from deployments.catalog.readiness import checked, make_ready
from deployments.errors import NotReady, Stale
from deployments.snapshot import Snapshot, TaskPatch, TaskRecord

logger = logging.getLogger("ray.serve")

Transition = Callable[[Snapshot], Snapshot]
Guarded = Callable[[int | None], Transition]
"""Makes a transition that holds only at a revision of its task, with None at any."""

# Another cluster on the same store may change the task between a draft and its write.
_TRIES = 8


class Changes:
    """What an administrator may do to tasks and versions. Owned by one event loop.

    Each change is drafted on the newest snapshot; what newly answers is validated, warmed and
    tried; then it is written, unless the task has changed since the draft. A change that is refused
    leaves nothing.
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
            Conflict: The version is there, with other rules.
            Stale: The task is not as `if_match` says.
            NotReady: No model replica can check them.
            Unsure: The store did not answer; the staging stays, for upkeep to clear up.
        """
        try:
            facts = await checked(self._effects.check(task, staging, {}))
        except Exception:
            await discard(self._store, staging)
            raise
        version, now_s = facts["version"], datetime.now(UTC).timestamp()
        known = False

        def added(seen: int | None) -> Transition:
            return lambda snapshot: state.add_version(
                snapshot, task, version, source, by, now_s, activate=activate, if_match=seen
            )

        async def place(record: TaskRecord | None, folders: Folders) -> None:
            nonlocal known
            if record is not None and (record.deleted or version in record.doomed):
                raise NotReady(f"{task}@{version} is being deleted; try again in a few seconds")
            known = record is not None and version in record.versions
            await asyncio.to_thread(give_way, self._store, staging, task, version, known)
            await folders.make(version, staging, known=known)

        what = {"publish": version, "source": source, "activate": activate}
        record = await self._change(
            task, added, by=by, what=what, if_match=if_match, staging=staging, place=place
        )
        return {**await self._told(task, record), "version": version, "created": not known}

    async def patch(
        self, task: str, patch: TaskPatch, *, by: str, if_match: int | None
    ) -> dict[str, Any]:
        """Change what a task does.

        Raises:
            TaskNotFound: There is no such task.
            BadInput: The patch, or a version that would answer, is wrong; with all problems.
            Stale: The task is not as `if_match` says.
        """
        what = patch.model_dump(mode="json", exclude_unset=True)
        record = await self._change(
            task,
            lambda seen: lambda snapshot: state.patch(snapshot, task, patch, seen),
            by=by,
            what=what,
            if_match=if_match,
        )
        return await self._told(task, record)

    async def rollback(self, task: str, *, by: str, if_match: int | None) -> dict[str, Any]:
        """Let the version answer that was active before; its golden answers are not asked for."""
        record = await self._change(
            task,
            lambda seen: lambda snapshot: state.rollback(snapshot, task, seen),
            by=by,
            what={"rollback": True},
            if_match=if_match,
            golden=False,
        )
        return await self._told(task, record)

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
        record = await self._change(
            task,
            lambda seen: lambda snapshot: state.delete_version(snapshot, task, version, seen),
            by=by,
            what={"delete": version},
            if_match=if_match,
        )
        return await self._told(task, record)

    async def _delete_task(self, task: str, by: str, if_match: int | None) -> dict[str, Any]:
        async with self._ledger.turn(task):
            try:
                await asyncio.to_thread(self._store.look, task)
                has_folder = True
            except TaskNotFound:
                has_folder = False
            except AdapterError:  # one that cannot be read can be deleted
                has_folder = True
            if not has_folder and task not in self._ledger.snapshot.tasks:
                raise TaskNotFound(task)
            await self._ledger.commit(
                lambda s: state.delete_task(s, task, if_match, has_folder=has_folder),
                by=by,
                task=task,
                what={"delete": "task"},
            )
            record = self._ledger.snapshot.tasks[task]
            if has_folder:
                record = await self._empty(task, record, by)
        return await self._told(task, record)

    async def _empty(self, task: str, record: TaskRecord, by: str) -> TaskRecord:
        """Remove a deleted task's plain folder at once: what comes there later is a new task."""
        try:
            await asyncio.to_thread(self._store.remove, task, None)
        except AdapterError as error:  # the task is deleted all the same
            logger.warning("task=%s its folder is removed later: %s", task, error)
            return record
        emptied = await self._ledger.commit(
            lambda s: state.folder_removed(s, task), by=by, task=task, what={"purged": "…"}
        )
        return emptied.tasks.get(task, record)

    async def _change(
        self,
        task: str,
        own: Guarded,
        *,
        by: str,
        what: dict[str, Any],
        if_match: int | None,
        golden: bool = True,
        staging: str | None = None,
        place: Callable[[TaskRecord | None, Folders], Awaitable[None]] | None = None,
    ) -> TaskRecord:
        """Draft, make ready and write a change; of one that is refused nothing stays.

        Args:
            task: The task.
            own: The change itself.
            by: Who wants it.
            what: What is changed, for the history.
            if_match: The etag that the task must have.
            golden: Whether golden answers are asked for.
            staging: What the change is made of; it goes.
            place: Awaited with the record before each draft, and with what makes folders; with one
                a task need not exist.
        """
        stagings = () if staging is None else (staging,)
        async with (
            self._ledger.turn(task),
            Folders(self._ledger, self._store, self._effects, task, *stagings) as folders,
        ):
            for _ in range(_TRIES):
                record = self._ledger.snapshot.tasks.get(task)
                _match(task, record, if_match)
                found = await self._found(task, by, place is None) if record is None else None
                if place is not None:
                    await place(record, folders)
                transition = _whole(own, record, found)
                await self._ready(task, record, found, transition, golden)
                if found is not None and found.version not in folders:
                    await self._adoption.copy(task, found.version, folders)
                try:
                    written = await self._ledger.commit(transition, by=by, task=task, what=what)
                except Stale:
                    if if_match is not None:
                        raise
                    continue
                return written.tasks[task]
            raise NotReady(f"task {task!r} changes all the time; try again in a second")

    async def _found(self, task: str, by: str, must: bool) -> Found | None:
        """Look at the plain folder of a task without a record; there need not be one to publish."""
        try:
            return await self._adoption.find(task, by)
        except TaskNotFound:
            if must:
                raise
        except AdapterRefused as error:
            if must:
                return await checked(_refused(error))
            logger.warning("adapter=%s its folder is not taken in: %s", task, error)
        return None

    async def _ready(
        self,
        task: str,
        record: TaskRecord | None,
        found: Found | None,
        transition: Transition,
        golden: bool,
    ) -> None:
        snapshot = self._ledger.snapshot
        known = record if found is None else found.taken_in(snapshot).tasks[task]
        draft = transition(snapshot).tasks[task]
        await make_ready(self._effects, task, known, draft, golden=golden)

    async def _told(self, task: str, record: TaskRecord) -> dict[str, Any]:
        """Wait until everybody knows, and say who does not."""
        waiting_for = await self._effects.reach(record.revision)
        return {
            "task": task,
            "revision": record.revision,
            "etag": record.revision,
            "everywhere": not waiting_for,
        }


def _whole(own: Guarded, record: TaskRecord | None, found: Found | None) -> Transition:
    """Take a plain folder in and change it, as one; else hold the change to what was drafted."""
    if found is not None:
        return lambda snapshot: own(None)(found.taken_in(snapshot))
    return own(0 if record is None else record.revision)


def _match(task: str, record: TaskRecord | None, if_match: int | None) -> None:
    etag = 0 if record is None else record.revision
    if if_match is not None and if_match != etag:
        raise Stale(f"task {task!r} is at etag {etag}, not {if_match}; read it again")


async def _refused(error: AdapterRefused) -> Found:
    raise error
