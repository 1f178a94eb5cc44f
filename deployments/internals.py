"""What Ray and Serve know and have no public name for: the one file with their private calls.

Pinned to Ray's minor version by tests/serve/test_internals.py.
"""

from __future__ import annotations

import asyncio
import socket

import ray
from ray._private import ray_constants, services
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ReplicaState

_NAMESPACE = "serve"
_CONTROLLER_S = 2.0
_CONNECT_S = 2.0


def last_cluster_is_dead() -> bool:
    """Tell whether nobody answers for the cluster that Ray would join here by itself.

    Ray notes where this machine's last cluster was and forgets it when that is stopped. Of one that
    was killed the note stays, and whoever starts next would wait for it in vain.
    """
    address = services.find_bootstrap_address(None)
    if address is None or services.get_ray_address_from_environment("local", None) != "local":
        return False  # there is none, or RAY_ADDRESS says which one to join
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError:
        return True
    return False


def is_encrypted() -> bool:
    """Tell whether Ray was told to encrypt what its processes say to each other."""
    return bool(ray_constants.env_bool("RAY_USE_TLS", False))


def bind_host() -> str:
    """Return the host that this cluster's HTTP proxies were configured to listen on."""
    client = _get_global_client()
    assert client is not None  # it raises where Serve does not run
    return str(client.http_config.host)


async def running_replicas(app: str, deployment: str) -> dict[str, str] | None:
    """Return the replicas of a deployment that may be asked for something, by Serve's own list.

    A handle has a copy of that list, which is late. Here is the controller's, from which all copies
    are made: before a replica is in it, nobody asks it for anything. Those that stop are in it too,
    since they answer to their end.

    Returns:
        Replica id -> name of its actor; None if the list cannot be had, or is empty.
    """
    try:
        client = _get_global_client()
        assert client is not None
        async with asyncio.timeout(_CONTROLLER_S):
            told = await client._controller.get_deployment_details.remote(app, deployment)
    except (RayError, RayServeException, TimeoutError):  # RayError: whatever the controller raised
        return None
    started = [one for one in told.replicas if one.state != ReplicaState.STARTING]
    return {one.replica_id: one.actor_name for one in started} or None


async def is_dead(actor_name: str) -> bool:
    """Tell whether a replica's process has ended, which Serve's list says only after a while."""
    try:
        await asyncio.to_thread(ray.get_actor, actor_name, _NAMESPACE)
    except ValueError:
        return True
    return False
