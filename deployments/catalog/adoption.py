"""Folders that people put into the store by hand become versions. No ray."""

from __future__ import annotations

import asyncio
import io
import logging
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime

from adapters.errors import AdapterError, TaskNotFound
from adapters.store import Look, Store
from deployments.catalog import state
from deployments.catalog.effects import Effects
from deployments.catalog.ledger import Ledger
from deployments.catalog.readiness import make_ready
from deployments.errors import RequestError
from deployments.snapshot import Snapshot, TaskRecord

logger = logging.getLogger("ray.serve")

_BY = "folder"


class Adoption:
    """Takes in plain folders and version folders. Owned by one event loop.

    A task that was never changed through the catalog is its plain folder, and needs no record. The
    first change takes the folder in: its files are copied, so that this version stays what it is
    whatever becomes of the folder. A folder that changes later is a new version, active only if
    the one before it was.
    """

    def __init__(self, ledger: Ledger, store: Store, effects: Effects) -> None:
        """Take what it works with."""
        self._ledger, self._store, self._effects = ledger, store, effects
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._looks: dict[str, Look] = {}  # of plain folders, as last taken in or refused
        self._unsettled: dict[str, Look] = {}
        self._folders: dict[str, int] = {}
        self._said: set[str] = set()

    async def adopt(self, task: str, by: str) -> TaskRecord:
        """Make a record of a task that is a plain folder; return the one that it has.

        Raises:
            TaskNotFound: There is no such folder.
            AdapterRefused: It cannot be served.
            AdapterIncomplete: It is still being copied.
            NotReady: No model replica is running.
        """
        async with self._turns[task]:
            record = self._ledger.snapshot.tasks.get(task)
            if record is None:
                await asyncio.to_thread(self._store.look, task)
                version = await self._copy(task)
                record = await self._commit(task, _taking_in(task, version, by), by, version)
            return record

    async def scan(self) -> None:
        """Take in what was put into the store, or changed there, since the last scan."""
        folders = await asyncio.to_thread(self._store.folders)
        new = [task for task, mark in folders.items() if self._folders.get(task) != mark]
        for task in new:
            if await self._take_versions(task):
                self._folders[task] = folders[task]
        for task, record in self._ledger.snapshot.tasks.items():
            if not record.deleted and task in folders:
                await self._follow_folder(task, record)

    async def _follow_folder(self, task: str, record: TaskRecord) -> None:
        """Take in a managed task's plain folder if it holds something else than before."""
        try:
            look = await asyncio.to_thread(self._store.look, task)
            if look == self._looks.get(task):
                return
            if look != self._unsettled.get(task):
                self._unsettled[task] = look  # it may still be changing: at the next scan
                return
            self._looks[task] = self._unsettled.pop(task)
            found = (await asyncio.to_thread(self._store.read, task)).version
            if found in (record.folder, *record.doomed):
                return
            async with self._turns[task]:
                version = await self._copy(task)
                transition = _taking_in(task, version, _BY)
                draft = transition(self._ledger.snapshot).tasks[task]
                await make_ready(self._effects, task, record, draft)
                await self._commit(task, transition, _BY, version)
            logger.info("adapter=%s@%s taken in from its folder", task, version)
        except TaskNotFound:
            self._looks.pop(task, None)
        except (AdapterError, RequestError) as error:
            logger.warning("adapter=%s its changed folder is not taken in: %s", task, error)

    async def _take_versions(self, task: str) -> bool:
        """Add version folders that no publication has made; tell whether all were looked at."""
        record = self._ledger.snapshot.tasks.get(task)
        if record is not None and record.deleted:
            return False
        found = await asyncio.to_thread(self._store.versions, task)
        known = () if record is None else (*record.versions, *record.doomed)
        ours = {(t, v) for _, t, v in await asyncio.to_thread(self._store.unfinished)}
        missing = [v for v in found if v not in known and (task, v) not in ours]
        if missing and record is None:
            try:
                await self.adopt(task, _BY)
            except TaskNotFound:
                missing.reverse()  # the latest first: the first of a task becomes active
            except (AdapterError, RequestError) as error:
                self._say_once(f"adapter={task} its folder is not taken in: {error}")
                return False
        all_taken = True
        for version in missing:
            try:
                await self._effects.describe(task, version, {})
            except (AdapterError, RequestError) as error:  # still being copied, or no model yet
                self._say_once(f"adapter={task}@{version} is not taken in: {error}")
                all_taken = False
                continue
            add = _adding(task, version)
            await self._ledger.commit(add, by=_BY, task=task, what={"found": version})
            logger.info("adapter=%s@%s taken in from the store", task, version)
        return all_taken

    def _say_once(self, sentence: str) -> None:
        """Log what every scan finds again."""
        if sentence not in self._said:
            self._said.add(sentence)
            logger.warning("%s", sentence)

    async def _copy(self, task: str) -> str:
        """Validate a plain folder, and make a version folder of its files; return its version."""
        facts = await self._effects.check(task, None, {})
        files = await asyncio.to_thread(self._store.read, task)
        named = {name: io.BytesIO(content) for name, content in files.contents.items()}
        staging = await asyncio.to_thread(self._store.stage, named)
        try:
            if files.version != facts["version"]:
                files = await asyncio.to_thread(self._store.read_staged, staging, task)
                await self._effects.check(task, staging, {})
            await asyncio.to_thread(self._store.publish, staging, task, files.version)
        finally:
            await asyncio.to_thread(self._store.discard, staging)
        return files.version

    async def _commit(
        self, task: str, transition: Callable[[Snapshot], Snapshot], by: str, version: str
    ) -> TaskRecord:
        written = await self._ledger.commit(transition, by=by, task=task, what={"folder": version})
        return written.tasks[task]


def _taking_in(task: str, version: str, by: str) -> Callable[[Snapshot], Snapshot]:
    now_s = datetime.now(UTC).timestamp()
    return lambda snapshot: state.adopt(snapshot, task, version, by, now_s)


def _adding(task: str, version: str) -> Callable[[Snapshot], Snapshot]:
    now_s = datetime.now(UTC).timestamp()
    return lambda snapshot: state.add_version(
        snapshot, task, version, "folder", _BY, now_s, activate=False, if_match=None
    )
