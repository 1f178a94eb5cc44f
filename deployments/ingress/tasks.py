"""Which version of a task answers a request, and what it says of itself."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass

from adapters.errors import (
    AdapterChanged,
    AdapterError,
    AdapterIncomplete,
    TaskNotFound,
    VersionNotFound,
)
from deployments.errors import NotReady
from deployments.ingress.described import Described, DescribeVersion
from deployments.ingress.folders import Folders
from deployments.ingress.traffic import Traffic
from deployments.rows import Facts
from deployments.snapshot import Snapshot, TaskRecord

# How long what is known of the catalog counts as true without word from it or from the store.
_LOST_AFTER_S = 5.0
# Tasks that changed at once, over which only those are prepared that were asked for here before:
# a start is no reason to load everything.
_MOST_PREPARED = 32
_PREPARED_AT_ONCE = 8
# A task may change again and again while a request is on its way.
_MOST_TRIES = 4


@dataclass(frozen=True, slots=True)
class Choice:
    """The version that is to answer a request.

    Attributes:
        task: The task.
        record: The catalog's; None for a task that is only a folder.
        version: The version; None for what the folder holds now.
        failed: The error of the one that was chosen first, for which this is the fallback.
        fallback_for: That one.
        num_tries: Which try of the request this is.
    """

    task: str
    record: TaskRecord | None = None
    version: str | None = None
    failed: AdapterError | None = None
    fallback_for: str | None = None
    num_tries: int = 1


class Tasks:
    """The catalog's tasks as of the installed snapshot, and beside them those that are folders.

    Owned by one event loop. Nobody is asked on the way of a request but for facts that are not
    known yet.

    Attributes:
        snapshot: What is true; whoever watches the catalog calls `prepare`, then sets it.
        folders: Tasks that the catalog does not have.
        refuse_when_lost: Whether 5 s without contact to the catalog end all answers.
    """

    def __init__(
        self,
        folders: Folders,
        describe: DescribeVersion,
        *,
        silent_s: Callable[[], float] = lambda: 0.0,
        refuse_when_lost: bool = True,
    ) -> None:
        """Start with an empty snapshot.

        Args:
            folders: Tasks that the catalog does not have.
            describe: Asks the model about a version; raises AdapterError.
            silent_s: Seconds since the catalog, or the store, last told what is true.
            refuse_when_lost: Whether 5 s of that end all answers, else they say so.
        """
        self.snapshot = Snapshot()
        self.folders = folders
        self._described = Described(describe)
        self._traffic = Traffic()
        self._silent_s = silent_s
        self.refuse_when_lost = refuse_when_lost
        self._changed: set[str] = set()  # by the last snapshot
        self._preparing: set[asyncio.Task[None]] = set()

    @property
    def stale_s(self) -> float | None:
        """How old what is known may be, None while that is no matter."""
        silent_s = self._silent_s()
        return silent_s if silent_s >= _LOST_AFTER_S else None

    def record(self, task: str) -> TaskRecord | None:
        """Return the catalog's record of a task, None if it has none.

        Raises:
            TaskNotFound: The task was deleted.
        """
        record = self.snapshot.tasks.get(task)
        if record is not None and record.deleted:
            raise TaskNotFound(task)
        return record

    async def names(self) -> list[str]:
        """Return the names of all tasks, sorted."""
        managed = self.snapshot.tasks
        names = {name for name in await self.folders.names() if name not in managed}
        return sorted(names.union(name for name in managed if not managed[name].deleted))

    def choose(self, task: str, routing_key: str | None = None) -> Choice:
        """Choose who answers a request, by the task's traffic.

        Args:
            task: The task.
            routing_key: Requests with the same one get the same version.

        Raises:
            TaskNotFound: The task was deleted; of an unknown one `facts` says so.
            NotReady: This ingress is out of contact, and does not know what is true.
        """
        if self.refuse_when_lost and (stale_s := self.stale_s) is not None:
            raise NotReady(
                f"this ingress has not reached the catalog or the store for {stale_s:.0f} s and "
                "does not answer by what may be old; try again in a second"
            )
        record = self.record(task)
        if record is None:
            return Choice(task)
        return Choice(task, record, self._traffic.choose(task, record, routing_key))

    async def facts(self, choice: Choice) -> Facts:
        """Return what the chosen version is.

        Raises:
            AdapterError: It cannot be had; see `instead`.
            NotReady: No model replica could be asked.
        """
        if choice.record is None or choice.version is None:
            return await self.folders.get(choice.task)
        return await self.facts_of(choice.task, choice.version, choice.record)

    async def facts_of(self, task: str, version: str, record: TaskRecord) -> Facts:
        """Return what any version of a record is, with errors as `facts`."""
        return await self._described.get(task, version, record)

    def known_facts(self, task: str, record: TaskRecord) -> Facts | None:
        """Return what is known of a task's active version, without asking.

        Raises:
            AdapterError: It is known that it cannot be had.
        """
        return self._described.peek(task, record.active, record)

    def is_outdated(self, choice: Choice) -> bool:
        """Tell whether the task has changed since the choice was made."""
        return self.snapshot.tasks.get(choice.task) != choice.record

    def instead(
        self, choice: Choice, error: AdapterError, routing_key: str | None = None
    ) -> Choice:
        """Choose again after the chosen version could not be had.

        If the task has changed meanwhile, by what is true now. Else its fallback. What is raised
        are copies: an error that a frame of its own traceback holds is a cycle, and stays in memory
        until Python looks for such, which it seldom does here.

        Raises:
            AdapterError: There is nothing else to choose; it says what the caller is told.
        """
        num_tries = choice.num_tries + 1
        if self.is_outdated(choice) and num_tries <= _MOST_TRIES:
            again = self.choose(choice.task, routing_key)
            return Choice(again.task, again.record, again.version, num_tries=num_tries)
        record, version = choice.record, choice.version
        if record is None or version is None:
            if isinstance(error, AdapterChanged) and choice.num_tries == 1:
                # The folder changed between the rules and the weights.
                self.folders.doubt(choice.task)
                return Choice(choice.task, num_tries=num_tries)
            raise copy.copy(error)
        if choice.failed is not None:
            raise copy.copy(choice.failed)
        closed = copy.copy(_closed(choice.task, version, error))
        if record.fallback is None or record.fallback == version:
            raise copy.copy(closed)
        return Choice(choice.task, record, record.fallback, closed, version, num_tries)

    async def prepare(self, old: Snapshot, new: Snapshot, changed: Collection[str]) -> None:
        """Ask about what a new snapshot may need, so that no request pays for it.

        Called before the snapshot is installed, which waits for it as long as `Watch` lets it;
        what is left then is asked for all the same. Never raises.

        Args:
            old: The installed one.
            new: The one that follows.
            changed: The tasks in which they differ.
        """
        self._forget_gone(old, new)
        self._changed = set(changed)
        turns = asyncio.Semaphore(_PREPARED_AT_ONCE)
        asked = [
            asyncio.create_task(self._ready(task, version, record, turns))
            for task in changed
            if (record := new.tasks.get(task)) is not None and not record.deleted
            if len(changed) <= _MOST_PREPARED or self._described.knows(task)
            for version in record.in_use
        ]
        self._preparing.update(asked)
        for task in asked:
            task.add_done_callback(self._preparing.discard)
        if asked:
            await asyncio.wait(asked)

    async def _ready(
        self, task: str, version: str, record: TaskRecord, turns: asyncio.Semaphore
    ) -> None:
        async with turns:
            with contextlib.suppress(Exception):  # whoever asks for it next is told
                await self.facts_of(task, version, record)

    def _forget_gone(self, old: Snapshot, new: Snapshot) -> None:
        """Forget what the installed snapshot let go of: until then requests could still ask."""
        for task in self._changed:
            self._described.keep(task, (old.tasks.get(task), new.tasks.get(task)))
            if task not in old.tasks:
                self._traffic.forget(task)


def _closed(task: str, version: str, error: AdapterError) -> AdapterError:
    """Say of a version that the catalog names that it cannot answer now: it is not unknown."""
    if isinstance(error, (TaskNotFound, VersionNotFound)):
        return AdapterIncomplete(task, f"version {version} is not in the store")
    return error
