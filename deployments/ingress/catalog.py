"""What the ingress asks of the catalog, wherever that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from deployments.errors import Unsure


class CatalogLost(Unsure):
    """The catalog went away while it worked on a change, which may have been made or not."""


class Catalog(Protocol):
    """The one writer. Each change answers once it is durable.

    The answer of a change is `{"task", "version"?, "revision", "etag", "everywhere", "created"?}`.

    `if_match` is the revision that the task must be at; with None any will do.

    Every change raises:
        Unsure: Nobody knows whether it was made, since the store or the catalog (`CatalogLost`) was
            lost meanwhile.
        RequestError, AdapterError: Nothing was changed.
    """

    async def publish(
        self, task: str, staging: str, *, source: str, by: str, activate: bool, if_match: int | None
    ) -> dict[str, Any]:
        """Make a version of what was staged, and discard the staging.

        After `Unsure` it stays, for whoever clears up later and sees by it what this was about. Any
        other NotReady may also say that no catalog was reached, and then it is still there too.
        """
        ...

    async def patch(
        self, task: str, patch: Mapping[str, Any], *, by: str, if_match: int | None
    ) -> dict[str, Any]:
        """Change what a `TaskPatch` says."""
        ...

    async def rollback(self, task: str, *, by: str, if_match: int | None) -> dict[str, Any]:
        """Activate the version that was active before."""
        ...

    async def delete(
        self, task: str, version: str | None, *, by: str, if_match: int | None
    ) -> dict[str, Any]:
        """Delete a version, or the task."""
        ...

    async def revision(self, n: int) -> dict[str, Any]:
        """Say whether every ingress answers by a revision, and else who does not."""
        ...

    async def history(
        self, task: str | None, before: int | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        """Return the changes of a task or of all, the newest first, and whether there are more."""
        ...
