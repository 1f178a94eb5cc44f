"""The catalog's state machine: changes in, revisions out, one after the other. No ray."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

from adapters.documents import Documents
from deployments.errors import NotReady
from deployments.journal import Change, Journal
from deployments.snapshot import Snapshot


class Writer:
    """Holds the newest revision, and makes the next.

    Several writers may work on one store, in several processes: who loses the race for a revision
    reads what the other wrote, and judges its change anew. Threads of a process take turns. Nothing
    in memory is the only copy of anything, so a writer may be killed at any time.
    """

    def __init__(self, documents: Documents) -> None:
        """Take where the catalog lies; nothing is read before the first `refresh` or `commit`."""
        self.journal = Journal(documents)
        self.snapshot = Snapshot()
        self._has_read = False
        self._turn = threading.Lock()

    def refresh(self) -> Snapshot:
        """Read newer revisions, if there are any; blocks.

        Raises:
            CatalogFormat: The newest is of another format.
            CatalogUnreadable: It cannot be read.
            OSError: The store cannot be read.
        """
        with self._turn:
            return self._refresh()

    def commit(
        self,
        transition: Callable[[Snapshot], Snapshot],
        *,
        by: str,
        task: str,
        what: dict[str, Any],
        now: datetime,
    ) -> Snapshot:
        """Make the next revision; it is durable when this returns. Blocks.

        Args:
            transition: Makes the next snapshot of the newest one, and is called again when another
                writer was faster. It may be several of `catalog/state.py`, one after the other.
            by: Who wants it.
            task: Of which task.
            what: What is changed, for the history; JSON.
            now: When.

        Returns:
            The new snapshot; the newest one as it is if the transition changes nothing.

        Raises:
            Exception: What the transition raises of the newest revision.
            CatalogUnreadable: As `refresh`.
            OSError: The store could not be written; the change may have become true all the same.
        """
        with self._turn:
            while True:
                old = self._refresh()
                new = _as_one(old, transition(old))
                if new is old:
                    return old
                record = old.tasks.get(task)
                change = Change(
                    revision=new.revision,
                    time=now.isoformat(),
                    by=by,
                    task=task,
                    what=what,
                    was=0 if record is None else record.revision,
                    id=secrets.token_hex(8),
                )
                try:
                    self.journal.write(new, change)
                except FileExistsError:
                    self._lost(old)
                    continue
                self.snapshot = new
                return new

    def _refresh(self) -> Snapshot:
        if not self._has_read:
            self.snapshot = self.journal.newest()
            self._has_read = True
        else:
            self.snapshot = self.journal.newer(self.snapshot.revision) or self.snapshot
        return self.snapshot

    def _lost(self, old: Snapshot) -> None:
        """Read who won; that there is nobody is a store that does not say what it has."""
        if self._refresh().revision <= old.revision:
            raise NotReady(
                f"the catalog's revision {old.revision + 1} is taken and cannot be found; try again"
            )


def _as_one(old: Snapshot, new: Snapshot) -> Snapshot:
    """Give what several transitions changed the one revision after the old one."""
    if new.tasks == old.tasks:
        return old
    if new.revision == old.revision + 1:
        return new
    revision = old.revision + 1
    tasks = {
        task: record
        if record is old.tasks.get(task)
        else record.model_copy(update={"revision": revision})
        for task, record in new.tasks.items()
    }
    return new.model_copy(update={"revision": revision, "tasks": tasks})
