"""Staged files become a version's folder, or the folder goes again. No ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from adapters.errors import AdapterError
from adapters.store import Store
from deployments.catalog.ledger import Ledger
from deployments.errors import Conflict

PutBack = Callable[[], Awaitable[None]]
"""Makes a version's folder again, of what it was made of."""


def publish_staged(store: Store, staging: str, task: str, version: str, known: bool) -> None:
    """Make a version of a staging. Blocks.

    Args:
        store: Where both are.
        staging: The staging, which stays.
        task: The task.
        version: The version that was staged.
        known: Whether the catalog has it. Then its folder stays as it is, and is mended if it is
            lost or broken; else one that a dead publication left gives way if it differs.

    Raises:
        Conflict: The version is known, with other files where its name does not tell.
        AdapterRefused: What was staged is not that version.
    """
    names = _differing(store, staging, task, version)
    if names and known:
        raise Conflict(
            f"{task}@{version} is there with another {' and '.join(names)}; change rules by "
            "PATCH, or delete that version first"
        )
    if names:
        store.remove(task, version)
    store.publish(staging, task, version)


async def withdraw(
    ledger: Ledger, store: Store, task: str, version: str, put_back: PutBack
) -> bool:
    """Remove a version's folder that no revision names; tell whether it is gone.

    Another cluster may publish the same version meanwhile, in the same folder. It writes the
    revision, and then looks whether the folder is there (`ensure_there`); this removes the folder,
    and then looks whether a revision names it. So one of both sees what the other did.

    Raises:
        Unsure: The store did not answer.
    """
    if await _is_known(ledger, task, version):
        return False
    await asyncio.to_thread(store.remove, task, version)
    if await _is_known(ledger, task, version):
        await put_back()
        return False
    return True


async def ensure_there(store: Store, task: str, version: str, put_back: PutBack) -> None:
    """Put back the folder of a version that a revision names now, if it is gone; see `withdraw`."""
    try:
        await asyncio.to_thread(store.read, task, version)
    except AdapterError:
        await put_back()


async def _is_known(ledger: Ledger, task: str, version: str) -> bool:
    record = (await ledger.refresh()).tasks.get(task)
    return record is not None and version in (*record.versions, *record.doomed)


def _differing(store: Store, staging: str, task: str, version: str) -> list[str]:
    """Return names of files that a staging and a version's folder do not share."""
    if version not in store.versions(task):
        return []
    try:
        kept = store.read(task, version).contents
    except AdapterError:
        return []  # publishing mends it
    staged = store.read_staged(staging, task).contents
    return sorted(n for n in kept.keys() | staged.keys() if kept.get(n) != staged.get(n))
