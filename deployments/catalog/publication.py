"""Staged files become a version's folder. No ray."""

from __future__ import annotations

from adapters.errors import AdapterError
from adapters.store import Store
from deployments.errors import Conflict


def publish_staged(store: Store, staging: str, task: str, version: str, known: bool) -> None:
    """Make a version of a staging. Blocks.

    Args:
        store: Where both are.
        staging: The staging; it has moved after this, unless the version was there already.
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
