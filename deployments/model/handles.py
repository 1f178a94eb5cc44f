"""Where a model replica is among the others, and how it reaches the catalog."""

from __future__ import annotations

import itertools
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from deployments import internals
from deployments.watch import Poll

# How long a replica that starts waits for the others' word.
_PEERS_S = 5.0


def replica_name() -> str:
    """Return this replica's id; without Serve this process is the one."""
    try:
        return serve.get_replica_context().replica_id.unique_id
    except RayServeException:
        return "alone"


def own_host() -> str | None:
    """Return where ingresses reach this replica; None without Serve, or if Ray is to encrypt."""
    try:
        serve.get_replica_context()
    except RayServeException:
        return None
    return None if internals.is_encrypted() else ray.util.get_node_ip_address()


def catalog_poll() -> Poll | None:
    """Return what asks the catalog for news; None without Serve, where there is no catalog."""
    try:
        app = serve.get_replica_context().app_name
    except RayServeException:
        return None

    async def poll(revision: int, after: str) -> dict[str, Any]:
        # By its name, which has to wait until both are deployed: the catalog has our handle.
        catalog = serve.get_deployment_handle("Catalog", app)
        page: dict[str, Any] = await catalog.poll.remote(revision, after)
        return page

    return poll


async def hot_on_peers() -> list[str]:
    """Return `task@version` of what was last asked of the other replicas, the latest first."""
    try:
        context = serve.get_replica_context()
    except RayServeException:
        return []
    handle = serve.get_deployment_handle(context.deployment, context.app_name)
    try:
        told = await handle.broadcast("hot").results_async(
            timeout_s=_PEERS_S, return_exceptions=True
        )
    except (DeploymentUnavailableError, TimeoutError):
        return []  # the first replica, or peers that are lost: this one must start all the more
    lists = [names for names in told if isinstance(names, list)]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*lists))
    return [name for name in dict.fromkeys(turns) if name is not None]


def num_nodes() -> int:
    """Return how many nodes replicas are spread over; without Ray this process is on the one."""
    if not ray.is_initialized():
        return 1
    return sum(node["Alive"] and node["Resources"].get("CPU", 0) >= 1 for node in ray.nodes())
