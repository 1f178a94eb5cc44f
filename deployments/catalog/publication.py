"""Staged files become versions' folders, or the folders go again. No ray."""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType

from adapters.errors import AdapterError
from adapters.store import Store
from deployments.catalog.effects import Effects
from deployments.catalog.ledger import Ledger
from deployments.errors import Conflict, Unsure

logger = logging.getLogger("ray.serve")


class Folders:
    """Version folders of one task that a change makes, until a revision names them.

    With a block that ends well they are there for good; with one that is refused those go that it
    has made. Then their stagings go. A block that does not know what became of its change, or is
    cancelled, leaves all to upkeep, which finds the stagings' markers.
    """

    def __init__(
        self, ledger: Ledger, store: Store, effects: Effects, task: str, *stagings: str
    ) -> None:
        """Take what it works with, and stagings that are to go with the block."""
        self._ledger, self._store, self._effects = ledger, store, effects
        self._task = task
        self._stagings = set(stagings)
        self._wanted: dict[str, str] = {}  # version -> a staging of it
        self._made: set[str] = set()

    def __contains__(self, version: str) -> bool:
        """Tell whether a version's folder was made, or found there."""
        return version in self._wanted

    async def make(self, version: str, staging: str, *, known: bool) -> None:
        """Make a version's folder of a staging, unless it is there.

        Args:
            version: The version.
            staging: The staging.
            known: Whether the catalog has the version, so that its folder stays whatever happens.

        Raises:
            AdapterRefused: What was staged is not that version.
            StoreUnreachable: The store did not answer.
        """
        self._stagings.add(staging)
        made = await asyncio.to_thread(self._store.publish, staging, self._task, version)
        self._wanted[version] = staging
        if known:
            self._made.discard(version)  # another cluster has written it since the first draft
        elif made:
            self._made.add(version)

    async def __aenter__(self) -> Folders:
        """Begin."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Keep or remove the folders.

        Raises:
            Unsure: The store did not answer.
        """
        if error is None:
            await self._keep()
        elif not isinstance(error, Exception) or isinstance(error, Unsure):
            return
        else:
            await self._withdraw(error)
        for staging in self._stagings:
            await discard(self._store, staging)

    async def _keep(self) -> None:
        for version, staging in self._wanted.items():
            try:
                await ensure_there(self._store, self._task, version, staging)
            except Exception as error:
                raise Unsure(
                    f"{self._task}@{version} is written, but its files may be missing ({error}); "
                    "read the task again"
                ) from error

    async def _withdraw(self, refused: Exception) -> None:
        for version in self._made:
            staging = self._wanted[version]
            try:
                gone = await withdraw(self._ledger, self._store, self._task, version, staging)
            except Exception as error:
                raise Unsure(
                    f"{refused}; the files of {self._task}@{version} are still there ({error}), "
                    "and are removed later"
                ) from refused
            if gone:
                await self._effects.forget(self._task, version)


def give_way(store: Store, staging: str, task: str, version: str, known: bool) -> None:
    """Remove a version's folder that differs from a staging of it, if nobody has it. Blocks.

    Args:
        store: Where both are.
        staging: The staging.
        task: The task.
        version: The version that was staged.
        known: Whether the catalog has it. Else the folder was left by a publication that died.

    Raises:
        Conflict: The version is known, with other files where its name does not tell.
    """
    names = _differing(store, staging, task, version)
    if names and known:
        raise Conflict(
            f"{task}@{version} is there with another {' and '.join(names)}; change rules by "
            "PATCH, or delete that version first"
        )
    if names:
        store.remove(task, version)


async def withdraw(ledger: Ledger, store: Store, task: str, version: str, staging: str) -> bool:
    """Remove a version's folder that no revision names; tell whether it is gone.

    Another cluster may publish the same version meanwhile, in the same folder. It writes the
    revision, and then looks whether the folder is there (`ensure_there`); this removes the folder,
    and then looks whether a revision names it. So one of both sees what the other did.

    Raises:
        Unsure: The store did not answer.
        AdapterError: It did not either, or the folder is none to remove.
    """
    if await _is_known(ledger, task, version):
        return False
    await asyncio.to_thread(store.remove, task, version)
    if await _is_known(ledger, task, version):
        await asyncio.to_thread(store.publish, staging, task, version)
        return False
    return True


async def ensure_there(store: Store, task: str, version: str, staging: str) -> None:
    """Put back the folder of a version that a revision names now, if it is gone; see `withdraw`.

    Raises:
        AdapterError: It cannot be put back.
    """
    try:
        await asyncio.to_thread(store.read, task, version)
    except AdapterError:
        await asyncio.to_thread(store.publish, staging, task, version)


async def discard(store: Store, staging: str) -> None:
    """Remove a staging; if the store does not answer, upkeep does so later."""
    try:
        await asyncio.to_thread(store.discard, staging)
    except Exception as error:
        logger.warning("staging=%s is left, to be removed later: %s", staging, error)


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
