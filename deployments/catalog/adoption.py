"""Folders that people put into the store by hand become versions. No ray."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

from adapters.errors import AdapterChanged, AdapterIncomplete, AdapterRefused, TaskNotFound
from adapters.store import Look, Store
from deployments.catalog import state
from deployments.catalog.effects import Effects
from deployments.catalog.ledger import Ledger
from deployments.catalog.publication import Folders
from deployments.catalog.readiness import make_ready
from deployments.errors import BadInput
from deployments.snapshot import Snapshot, TaskRecord

logger = logging.getLogger("ray.serve")

_BY = "folder"


class Found(NamedTuple):
    """What a plain folder holds.

    Attributes:
        version: The version.
        taken_in: Makes a snapshot in which the task has it.
    """

    version: str
    taken_in: Callable[[Snapshot], Snapshot]


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
        self._looks: dict[str, Look] = {}  # of plain folders, as last taken in or refused
        self._unsettled: dict[str, Look] = {}
        self._refused: dict[str, Look] = {}  # of plain folders of tasks without a record
        # Marks of folders whose versions were taken in, and of plain folders of managed tasks.
        self._folders: dict[str, int] = {}
        self._followed: dict[str, int] = {}
        self._said: set[str] = set()

    async def find(self, task: str, by: str) -> Found:
        """Validate a plain folder of a task that has no record.

        Raises:
            TaskNotFound: There is no such folder.
            AdapterRefused: It cannot be served.
            AdapterIncomplete: It is still being copied.
            NotReady: No model replica is running.
        """
        await asyncio.to_thread(self._store.look, task)
        version = (await self._effects.check(task, None, {}))["version"]
        now_s = datetime.now(UTC).timestamp()
        return Found(version, lambda s: state.adopt(s, task, version, by, now_s, if_match=0))

    async def copy(self, task: str, version: str, folders: Folders) -> None:
        """Make a version folder of a plain folder's files.

        Args:
            task: The task.
            version: What the plain folder held when it was looked at.
            folders: Makes it, and removes it if the change is refused.

        Raises:
            AdapterChanged: It holds another version by now.
        """
        files = await asyncio.to_thread(self._store.read, task)
        if files.version != version:
            raise AdapterChanged(task, version, files.version)
        named = {name: io.BytesIO(content) for name, content in files.contents.items()}
        staging = await asyncio.to_thread(self._store.stage, named)
        await folders.make(version, staging, known=False)

    async def scan(self) -> float:
        """Take in what was put into the store, or changed there, since the last scan.

        Returns:
            How long it took to look at all folders, in seconds, apart from what was then taken in.
        """
        started_s = time.monotonic()
        folders = await asyncio.to_thread(self._store.folders)
        looked_s = time.monotonic() - started_s
        new = [task for task, mark in folders.items() if self._folders.get(task) != mark]
        unfinished = await asyncio.to_thread(self._store.unfinished) if new else []
        ours = {(task, version) for _, task, version in unfinished}
        for task in new:
            try:
                if await self._take_versions(task, ours):
                    self._folders[task] = folders[task]
            except Exception as error:  # of this task alone, and perhaps not at the next scan
                self._say_once(f"adapter={task} is not taken in: {error}")
        self._refused = {task: look for task, look in self._refused.items() if task in folders}
        managed = self._ledger.snapshot.tasks.items()
        live = {task: record for task, record in managed if not record.deleted and task in folders}
        self._followed = {task: mark for task, mark in self._followed.items() if task in live}
        for task, record in live.items():
            if self._followed.get(task) != folders[task]:
                try:
                    if await self._follow_folder(task, record):
                        self._followed[task] = folders[task]
                except Exception as error:
                    self._say_once(f"adapter={task} its changed folder is not taken in: {error}")
        return looked_s

    async def _follow_folder(self, task: str, record: TaskRecord) -> bool:
        """Take in a managed task's plain folder if it holds something else than before.

        Returns:
            Whether there is no more to do until its mark is another one.
        """
        try:
            look = await asyncio.to_thread(self._store.look, task)
        except TaskNotFound:  # it has versions only
            self._looks.pop(task, None)
            return True
        if look == self._looks.get(task):
            return True
        if look != self._unsettled.get(task):
            self._unsettled[task] = look  # it may still be changing: at the next scan
            return False
        found = (await asyncio.to_thread(self._store.read, task)).version
        if found not in (record.folder, *record.doomed):
            try:
                await self._take_in(task, record, found)
            except (AdapterRefused, BadInput) as error:  # and not again until it changes
                logger.warning("adapter=%s its changed folder is refused: %s", task, error)
        self._looks[task] = self._unsettled.pop(task)
        return True

    async def _take_in(self, task: str, record: TaskRecord, version: str) -> None:
        """Make a version of a managed task's changed folder, unless the task changes meanwhile."""
        now_s, seen = datetime.now(UTC).timestamp(), record.revision

        def taken_in(snapshot: Snapshot) -> Snapshot:
            return state.adopt(snapshot, task, version, _BY, now_s, if_match=seen)

        async with self._ledger.turn(task), self._folders_of(task) as folders:
            await self._effects.check(task, None, record.rules)
            await self.copy(task, version, folders)
            draft = taken_in(self._ledger.snapshot).tasks[task]
            await make_ready(self._effects, task, record, draft)
            await self._ledger.commit(taken_in, by=_BY, task=task, what={"folder": version})
        logger.info("adapter=%s@%s taken in from its folder", task, version)

    async def _take_versions(self, task: str, ours: set[tuple[str | None, str | None]]) -> bool:
        """Add version folders that no publication has made; tell whether all were taken."""
        record = self._ledger.snapshot.tasks.get(task)
        if record is not None and record.deleted:
            return False
        found = await asyncio.to_thread(self._store.versions, task)
        known = () if record is None else (*record.versions, *record.doomed)
        missing = [v for v in found if v not in known and (task, v) not in ours]
        if missing and record is None:
            missing = await self._take_plain(task, missing)
        all_taken = True
        for version in missing:
            try:
                await self._add(task, version)
            except Exception as error:  # it is still being copied, or there is no model yet
                self._say_once(f"adapter={task}@{version} is not taken in: {error}")
                all_taken = False
        return all_taken

    async def _take_plain(self, task: str, missing: list[str]) -> list[str]:
        """Take in the plain folder beside a task's first versions; return the order of those."""
        latest_first = missing[::-1]  # the first of a task becomes active
        look: Look | None = None
        try:
            look = await asyncio.to_thread(self._store.look, task)
            if look == self._refused.get(task):
                return latest_first
            found = await self.find(task, _BY)
        except TaskNotFound:
            return latest_first
        except AdapterRefused as error:  # and not again until it changes
            self._say_once(f"adapter={task} its folder is not taken in: {error}")
            if look is not None:
                self._refused[task] = look
            return latest_first
        async with self._ledger.turn(task), self._folders_of(task) as folders:
            await self.copy(task, found.version, folders)
            what = {"folder": found.version}
            await self._ledger.commit(found.taken_in, by=_BY, task=task, what=what)
        return [version for version in missing if version != found.version]

    async def _add(self, task: str, version: str) -> None:
        now_s = datetime.now(UTC).timestamp()

        def added(snapshot: Snapshot) -> Snapshot:
            return state.add_version(
                snapshot, task, version, "folder", _BY, now_s, activate=False, if_match=None
            )

        async with self._ledger.turn(task):
            # A publication has its marker before its folder, so if it has none by now it has ended:
            # the catalog knows the version, or the folder is gone.
            unfinished = await asyncio.to_thread(self._store.unfinished)
            if (task, version) in {(t, v) for _, t, v in unfinished}:
                raise AdapterIncomplete(task, f"{version} is being published")
            await self._effects.describe(task, version, {})
            snapshot = self._ledger.snapshot
            draft = added(snapshot).tasks[task]
            await make_ready(self._effects, task, snapshot.tasks.get(task), draft)
            await self._ledger.commit(added, by=_BY, task=task, what={"found": version})
        logger.info("adapter=%s@%s taken in from the store", task, version)

    def _folders_of(self, task: str) -> Folders:
        return Folders(self._ledger, self._store, self._effects, task)

    def _say_once(self, sentence: str) -> None:
        """Log what every scan finds again."""
        if sentence not in self._said:
            self._said.add(sentence)
            logger.warning("%s", sentence)
