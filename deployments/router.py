"""Which replica Ray Serve sends a call to: the one that the call names.

Serve pickles this file by value into every process that calls the deployment, so it imports
nothing but ray and the standard library, and decides nothing: the ingress has placed the rows.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class NamedReplica(RequestRouter):
    """Obeys a call that names a replica (`session_id`); others go to the shorter queue of two.

    A replica that is named and gone, or full, is not waited for: the call goes to another, which
    tells its caller who it is.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return replicas in ranks, of which Serve takes the first that has room."""
        some = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if pending_request is None:
            return [some]
        pending_request.routing_context.should_backoff = True  # else a full deployment spins
        name: Any = pending_request.metadata.session_id
        named = [r for r in candidate_replicas if name and r.replica_id.unique_id == name]
        return [named, some] if named else [some]
