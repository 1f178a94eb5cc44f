"""How many model replicas a load needs. Imports only Ray's types and the standard library.

Serve pickles this file into its controller, where nothing else of ours need be importable.
"""

from __future__ import annotations

import math
from typing import Any

# What a replica tells; see `deployments.model.deployment.Model.record_autoscaling_stats`.
QUEUED = "queued_tokens"
SPEED = "tokens_per_s"
ANSWERED = "answered_tokens_per_s"
# For how long a row may wait on average, its forward included, before there are more replicas.
_WAIT_S = 0.25
# There is one replica less if the others would then have so much of what they can do.
_UTILISATION = 0.6


def replicas_for(context: Any) -> tuple[int, dict[str, Any]]:
    """Say how many replicas there should be; Serve applies bounds and delays of the YAML.

    Args:
        context: Serve's `AutoscalingContext`; of its metrics it has averages over the look-back
            period, by replica.
    """
    metrics = context.aggregated_metrics or {}
    queued, speeds, answered = (
        list(metrics.get(name, {}).values()) for name in (QUEUED, SPEED, ANSWERED)
    )
    return needed(queued, speeds, answered, max(1, context.target_num_replicas)), {}


def needed(
    queued_tokens: list[float],
    tokens_per_s: list[float],
    answered_tokens_per_s: list[float],
    current: int,
) -> int:
    """Return the replicas that a load needs.

    By Little's law the tokens that are queued on average are those that come a second, times
    the seconds that they wait. So if no replica has more queued than it does in the time that a
    row may wait, rows wait no longer than that. A replica leaves only if the others can well take
    over what it answers: a short queue alone does not say so.

    Args:
        queued_tokens: Of each replica, those that are in its forward included.
        tokens_per_s: What each can do; 0 for one that has not answered anything.
        answered_tokens_per_s: What each does.
        current: How many there are to be now.
    """
    speeds = [speed for speed in tokens_per_s if speed > 0]
    if not speeds:
        return current
    speed = sum(speeds) / len(speeds)
    for_queue = sum(queued_tokens) / (speed * _WAIT_S)
    for_load = sum(answered_tokens_per_s) / (speed * _UTILISATION)
    if for_queue > current:
        return math.ceil(for_queue)
    return max(1, min(current, math.ceil(max(for_queue, for_load))))
