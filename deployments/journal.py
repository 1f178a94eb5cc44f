"""The catalog's files: one a revision, and one a change. No ray, no torch.

`catalog/{n}.json` is the whole state at revision n; the highest is true. `catalog/history/{n}.json`
is the change that made it. Every file is made create-only, so of two writers that make the same
revision one is told so and begins anew. Old revisions are pruned, changes are kept: a revision is
pruned only once its change is written, so a number that has been used stays taken for ever, and a
writer that slept through many revisions cannot take one that was pruned.
"""

from __future__ import annotations

import logging
import re
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from adapters.documents import Documents
from deployments.errors import NotReady
from deployments.snapshot import FORMAT, Snapshot

logger = logging.getLogger("ray.serve")

FOLDER = "catalog"
NUM_KEPT = 32
"""Revisions that stay readable: those who read one while it is pruned find a newer one."""

_NAME = re.compile(r"([1-9][0-9]{0,17})\.json")
_TRIES = 10
# How far back the last change of a task that is forgotten is looked for.
_MAX_LOOKED_BACK = 200


class CatalogUnreadable(NotReady):
    """A file of the catalog is not what a catalog writes."""


class CatalogFormat(CatalogUnreadable):
    """A file of the catalog has a format that this version of the server does not know."""


class Change(BaseModel):
    """What made a revision."""

    model_config = ConfigDict(frozen=True)

    revision: int
    time: str  # ISO 8601
    by: str
    task: str
    what: dict[str, Any]
    was: int = 0  # the task's revision before, 0 if it had no record
    id: str  # nobody else's: tells two writers' attempts at one revision apart


class _File(Snapshot):
    format: Literal[1]
    change: Change


class Journal:
    """Reads and writes revisions; all calls block. Any thread may read, one at a time may write."""

    def __init__(self, documents: Documents) -> None:
        """Take where they lie."""
        self._documents = documents
        self._told: set[int] = set()  # revisions whose changes are known to be written

    def exists(self) -> bool:
        """Tell whether there is a catalog at all."""
        return bool(self._numbers())

    def newest(self) -> tuple[Snapshot, Change | None]:
        """Return the newest revision and the change that made it; revision 0 if there is none.

        Raises:
            CatalogFormat: It is of another format.
            CatalogUnreadable: It is torn, or not there although it was.
            OSError: The store cannot be read.
        """
        for _ in range(_TRIES):
            numbers = self._numbers()
            if not numbers:
                self._must_be_new()
                return Snapshot(), None
            path = _revision_path(max(numbers))
            try:
                content = self._documents.read(path)
            except FileNotFoundError:
                continue  # pruned since it was listed, so there are many newer ones
            file = _decode(path, content, max(numbers))
            return Snapshot(revision=file.revision, tasks=file.tasks), file.change
        raise NotReady(f"{FOLDER}/ changes faster than it can be read; try again")

    def newer(self, revision: int) -> Snapshot | None:
        """Return the newest revision if there is one after this, without listing if there is not.

        Raises:
            As `newest`.
        """
        if revision == 0:
            snapshot, _ = self.newest()
            return snapshot if snapshot.revision else None
        # In this order: a pruned revision's change is there before the revision goes.
        after = revision + 1
        if not any(map(self._is_there, (_revision_path(after), _change_path(after)))):
            return None
        snapshot, _ = self.newest()
        if snapshot.revision <= revision:
            raise CatalogUnreadable(
                f"{_change_path(after)} tells of a revision that is not there; put "
                f"{_revision_path(after)} back, or remove the history from there on"
            )
        return snapshot

    def write(self, snapshot: Snapshot, change: Change) -> None:
        """Make a snapshot the newest revision; it is durable when this returns.

        Raises:
            FileExistsError: Another writer has made this revision.
            OSError: It may have become true, or may not.
        """
        revision = snapshot.revision
        file = _File.model_construct(
            format=FORMAT, revision=revision, tasks=snapshot.tasks, change=change
        )
        path = _revision_path(revision)
        self._documents.create(path, file.model_dump_json().encode())
        try:
            self._documents.create(_change_path(revision), change.model_dump_json().encode())
        except FileExistsError:
            found = self._read_change(revision)
            if found is None or found.id != change.id:
                # It was pruned before we began: what we wrote is not, and never was, the highest.
                self._documents.delete(path)
                raise
        self._told.add(revision)
        try:
            self._prune(revision)
        except (OSError, NotReady) as error:
            logger.warning("catalog revision=%d: old ones are not pruned: %s", revision, error)

    def history(self, *, task: str | None, before: int | None, limit: int) -> list[Change]:
        """Return changes, the latest first.

        Args:
            task: Of this task alone. Of one that has no record any more, they are found if the
                last of them is among the latest 200 of all.
            before: Only those of earlier revisions, None for all.
            limit: Most to return.

        Raises:
            As `newest`.
        """
        newest, _ = self.newest()
        revision = newest.revision if before is None else min(newest.revision, before - 1)
        if task is not None:
            record = newest.tasks.get(task)
            revision = self._last_of(task, newest.revision if record is None else record.revision)
        changes: list[Change] = []
        while revision > 0 and len(changes) < limit:
            change = self._change(revision)
            if change is not None and (before is None or revision < before):
                changes.append(change)
            revision = revision - 1 if change is None or task is None else change.was
        return changes

    def _last_of(self, task: str, revision: int) -> int:
        """Return the latest revision up to this that a task's change made, 0 if none is near."""
        for one in range(revision, max(0, revision - _MAX_LOOKED_BACK), -1):
            change = self._change(one)
            if change is not None and change.task == task:
                return one
        return 0

    def _change(self, revision: int) -> Change | None:
        """Return a revision's change; from the revision, if its writer was killed in between."""
        found = self._read_change(revision)
        if found is not None:
            return found
        path = _revision_path(revision)
        try:
            return _decode(path, self._documents.read(path), revision).change
        except FileNotFoundError:
            return None

    def _read_change(self, revision: int) -> Change | None:
        path = _change_path(revision)
        try:
            return Change.model_validate_json(self._documents.read(path))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise CatalogUnreadable(f"{path} is not a change: {_first(error)}") from None

    def _prune(self, newest: int) -> None:
        """Remove revisions that nobody reads any more, once their changes are written."""
        numbers = self._numbers()
        self._told &= numbers
        for number in sorted(numbers):
            if number not in self._told and number < newest:
                self._fill_in(number)
            if number <= newest - NUM_KEPT:
                self._documents.delete(_revision_path(number))

    def _fill_in(self, revision: int) -> None:
        """Write the change of a revision whose writer was killed before it did."""
        if not self._is_there(_change_path(revision)):
            path = _revision_path(revision)
            try:
                change = _decode(path, self._documents.read(path), revision).change
                self._documents.create(_change_path(revision), change.model_dump_json().encode())
            except FileNotFoundError:
                return  # another writer has pruned it
            except FileExistsError:
                pass  # another writer was faster
        self._told.add(revision)

    def _must_be_new(self) -> None:
        if self._documents.names(f"{FOLDER}/history"):
            raise CatalogUnreadable(
                f"{FOLDER}/history tells of revisions, and {FOLDER}/ has none; put back the "
                "highest, or remove the history to begin anew"
            )

    def _is_there(self, path: str) -> bool:
        try:
            self._documents.read(path)
        except FileNotFoundError:
            return False
        return True

    def _numbers(self) -> set[int]:
        found = map(_NAME.fullmatch, self._documents.names(FOLDER))
        return {int(match[1]) for match in found if match}


def _revision_path(revision: int) -> str:
    return f"{FOLDER}/{revision}.json"


def _change_path(revision: int) -> str:
    return f"{FOLDER}/history/{revision}.json"


def _decode(path: str, content: bytes, revision: int) -> _File:
    try:
        file = _File.model_validate_json(content)
    except ValidationError as error:
        raise _unreadable(path, content, error) from None
    if not file.revision == file.change.revision == revision:
        raise CatalogUnreadable(f"{path} says that it is revision {file.revision}")
    return file


def _unreadable(path: str, content: bytes, error: ValidationError) -> CatalogUnreadable:
    """Say that a file is of another format, else what is wrong with it."""
    try:
        found = orjson.loads(content)["format"]
    except (orjson.JSONDecodeError, TypeError, KeyError):
        found = FORMAT
    if found != FORMAT:
        return CatalogFormat(
            f"{path} has format {found!r:.20}, and this server knows format {FORMAT}; "
            "run a version that knows it"
        )
    return CatalogUnreadable(f"{path} is no revision of a catalog: {_first(error)}")


def _first(error: ValidationError) -> str:
    detail = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(map(str, detail["loc"]))
    return f"{where}: {detail['msg']}" if where else detail["msg"]
