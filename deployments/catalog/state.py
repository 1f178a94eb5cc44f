"""What may become of the catalog's tasks: plain functions from a snapshot to the next. No IO.

Each returns a snapshot one revision later whose changed record is valid as a whole, or the very
snapshot that it got if there is nothing to change.

`if_match` is the etag that the caller has read, None for any: the revision at which the task last
changed, 0 for one that has no record.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from adapters.errors import TASK_NAME, TaskNotFound, VersionNotFound
from deployments.catalog.patch import patched
from deployments.errors import Conflict, NotReady, Stale
from deployments.snapshot import Snapshot, TaskPatch, TaskRecord, VersionRecord

MAX_PREVIOUS = 16
_NO_VERSION = "0" * 8


def add_version(
    snapshot: Snapshot,
    task: str,
    version: str,
    source: str,
    by: str,
    now_s: float,
    *,
    activate: bool,
    if_match: int | None,
) -> Snapshot:
    """Add a version whose files are published; the first of a task becomes active.

    Raises:
        TaskNotFound: No task can have that name.
        NotReady: The task, or this version of it, is being deleted.
        Stale: The task is not as `if_match` says.
    """
    record = _growing(snapshot, task, version, if_match)
    came = VersionRecord(created_s=now_s, by=by, source=source)
    if record is None:
        return _with(snapshot, task, _new(version, came))
    if version not in record.versions:
        record = record.model_copy(update={"versions": {**record.versions, version: came}})
    return _with(snapshot, task, _activated(record, version) if activate else record)


def adopt(
    snapshot: Snapshot,
    task: str,
    version: str,
    by: str,
    now_s: float,
    *,
    if_match: int | None = None,
) -> Snapshot:
    """Take in what a task's plain folder holds; active if the folder's version before it was.

    A version that was deleted and still lies in the folder does not come back.

    Raises:
        As `add_version`.
    """
    record = _growing(snapshot, task, None, if_match)
    came = VersionRecord(created_s=now_s, by=by, source="folder")
    if record is None:
        return _with(snapshot, task, _new(version, came, folder=version))
    if version == record.folder:
        return snapshot
    _growing(snapshot, task, version, if_match)
    follows = record.active == record.folder
    versions = {version: came, **record.versions}
    record = record.model_copy(update={"versions": versions, "folder": version})
    return _with(snapshot, task, _activated(record, version) if follows else record)


def patch(snapshot: Snapshot, task: str, patch: TaskPatch, if_match: int | None) -> Snapshot:
    """Change what a patch gives, all of it or nothing.

    Raises:
        TaskNotFound: There is no such task.
        Stale: The task is not as `if_match` says.
        BadInput: What would come of it is wrong; with all problems.
    """
    record = _known(snapshot, task, if_match)
    active = patch.active or record.active
    moved = _activated(record, active) if active in record.versions else record
    return _with(snapshot, task, patched(moved, record, patch))


def rollback(snapshot: Snapshot, task: str, if_match: int | None) -> Snapshot:
    """Let the version answer that was active before; a second one goes back further.

    A fallback to that version ends with it, as its traffic and shadow do.

    Raises:
        TaskNotFound: There is no such task.
        Stale: The task is not as `if_match` says.
        Conflict: No version was active before.
    """
    record = _known(snapshot, task, if_match)
    if not record.previous:
        raise Conflict(
            f'task {task!r} has no version that was active before; name one: PATCH {{"active": …}}'
        )
    *previous, version = record.previous
    back = _activated(record, version)
    return _with(snapshot, task, back.model_copy(update={"previous": _walk(previous, version)}))


def delete_version(snapshot: Snapshot, task: str, version: str, if_match: int | None) -> Snapshot:
    """Doom a version that nothing asks for: its files may go once everybody knows.

    Raises:
        TaskNotFound: There is no such task.
        VersionNotFound: It has no such version.
        Stale: The task is not as `if_match` says.
        Conflict: The version is in use.
    """
    record = _known(snapshot, task, if_match)
    if version not in record.versions:
        raise VersionNotFound(task, version)
    if version in record.in_use:
        roles = " and ".join(_roles(record, version))
        raise Conflict(f"{task}@{version} cannot be deleted while it {roles}; change that first")
    versions = {name: one for name, one in record.versions.items() if name != version}
    rest = [name for name in record.previous if name != version]
    update = {
        "versions": versions,
        "previous": _walk(rest, record.active),
        "doomed": (*record.doomed, version),
    }
    return _with(snapshot, task, record.model_copy(update=update))


def delete_task(
    snapshot: Snapshot, task: str, if_match: int | None, *, has_folder: bool = False
) -> Snapshot:
    """Make a task none any more: its files may go once everybody knows.

    One without a record gets a record that says so, since its plain folder is still there; so does
    one that `has_folder`, until that is removed.

    Raises:
        TaskNotFound: There can be no such task, or it is being deleted already.
        Stale: The task is not as `if_match` says.
    """
    if task not in snapshot.tasks:
        _growing(snapshot, task, None, if_match)
        gone = TaskRecord.model_validate(
            {
                "revision": 0,
                "active": _NO_VERSION,
                "versions": {},
                "folder": _NO_VERSION if has_folder else None,
                "deleted": True,
            }
        )
        return _with(snapshot, task, gone)
    record = _known(snapshot, task, if_match)
    nothing: dict[str, Any] = {
        "traffic": {},
        "shadow": None,
        "fallback": None,
        "pinned": False,
        "folder": record.folder or _NO_VERSION if has_folder else None,
    }
    return _with(snapshot, task, record.model_copy(update={**nothing, "deleted": True}))


def folder_removed(snapshot: Snapshot, task: str) -> Snapshot:
    """Forget the plain folder of a deleted task: what lies there from now on is another one."""
    record = snapshot.tasks.get(task)
    if record is None or not record.deleted:
        return snapshot
    return _with(snapshot, task, record.model_copy(update={"folder": None}))


def purged(snapshot: Snapshot, task: str, version: str | None) -> Snapshot:
    """Forget what was deleted, now that its files are gone: a version, or with None the task."""
    record = snapshot.tasks.get(task)
    if record is not None and version in record.doomed:
        doomed = tuple(name for name in record.doomed if name != version)
        return _with(snapshot, task, record.model_copy(update={"doomed": doomed}))
    if record is not None and version is None and record.deleted:
        tasks = {name: one for name, one in snapshot.tasks.items() if name != task}
        return Snapshot(revision=snapshot.revision + 1, tasks=tasks)
    return snapshot


def return_traffic(snapshot: Snapshot, task: str, version: str) -> Snapshot:
    """Give a version's share back to the active one; the history says why."""
    record = snapshot.tasks.get(task)
    if record is None or version not in record.traffic:
        return snapshot
    traffic = {name: share for name, share in record.traffic.items() if name != version}
    return _with(snapshot, task, record.model_copy(update={"traffic": traffic}))


def _with(snapshot: Snapshot, task: str, record: TaskRecord) -> Snapshot:
    """Return the next snapshot, with a record that its file can be read with."""
    if record == snapshot.tasks.get(task):
        return snapshot
    revision = snapshot.revision + 1
    checked = TaskRecord.model_validate({**record.model_dump(), "revision": revision})
    tasks = {**snapshot.tasks, task: checked}
    return snapshot.model_copy(update={"revision": revision, "tasks": tasks})


def _new(version: str, came: VersionRecord, folder: str | None = None) -> TaskRecord:
    fields = {"revision": 0, "active": version, "versions": {version: came}, "folder": folder}
    return TaskRecord.model_validate(fields)


def _known(snapshot: Snapshot, task: str, if_match: int | None) -> TaskRecord:
    record = snapshot.tasks.get(task)
    if record is None or record.deleted:
        raise TaskNotFound(task)
    _match(task, record, if_match)
    return record


def _growing(
    snapshot: Snapshot, task: str, version: str | None, if_match: int | None
) -> TaskRecord | None:
    """Return the record of a task that is to get a version, None if it has none yet."""
    if not TASK_NAME.fullmatch(task):
        raise TaskNotFound(task)
    record = snapshot.tasks.get(task)
    if record is not None and (record.deleted or version in record.doomed):
        what = f"task {task!r}" if record.deleted else f"{task}@{version}"
        raise NotReady(f"{what} is being deleted; try again in a few seconds")
    _match(task, record, if_match)
    return record


def _match(task: str, record: TaskRecord | None, if_match: int | None) -> None:
    etag = 0 if record is None else record.revision
    if if_match is not None and if_match != etag:
        raise Stale(
            f"task {task!r} has etag {etag}, not {if_match}; "
            "read it again, and send the change with its new etag"
        )


def _activated(record: TaskRecord, version: str) -> TaskRecord:
    """Let a version answer; what it was beside the active one ends, and the last is remembered."""
    if version == record.active:
        return record
    is_shadow = record.shadow is not None and record.shadow.version == version
    update = {
        "active": version,
        "previous": _walk((*record.previous, record.active), version),
        "traffic": {name: share for name, share in record.traffic.items() if name != version},
        "shadow": None if is_shadow else record.shadow,
        "fallback": None if record.fallback == version else record.fallback,
    }
    return record.model_copy(update=update)


def _walk(versions: Iterable[str], active: str) -> tuple[str, ...]:
    """Return versions that were active one after the other, up to the one that is now."""
    walked: list[str] = []
    for version in versions:
        if not walked or walked[-1] != version:
            walked.append(version)
    if walked and walked[-1] == active:
        walked.pop()
    return tuple(walked[-MAX_PREVIOUS:])


def _roles(record: TaskRecord, version: str) -> list[str]:
    roles = {
        "is active": version == record.active,
        "has traffic": version in record.traffic,
        "is the shadow": record.shadow is not None and record.shadow.version == version,
        "is the fallback": version == record.fallback,
    }
    return [role for role, has in roles.items() if has]
