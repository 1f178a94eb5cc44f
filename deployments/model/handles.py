"""Where a model replica is among the others, and how it reaches the catalog."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException

from deployments.watch import Poll


def replica_name() -> str:
    """Return this replica's id; without Serve this process is the one."""
    try:
        return serve.get_replica_context().replica_id.unique_id
    except RayServeException:
        return "alone"


def catalog_poll() -> Poll | None:
    """Return what asks the catalog for news; None without Serve, where there is no catalog."""
    try:
        app = serve.get_replica_context().app_name
    except RayServeException:
        return None

    async def poll(watcher: str, revision: int, after: str) -> dict[str, Any]:
        # By its name, which has to wait until both are deployed: the catalog has our handle.
        catalog = serve.get_deployment_handle("Catalog", app)
        page: dict[str, Any] = await catalog.poll.remote(watcher, revision, after)
        return page

    return poll
