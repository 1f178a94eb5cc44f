"""The application: `serve run deployments.app:build base_model=… adapter_store=…`."""

# No `from __future__ import annotations` here: Ray reads the annotation of `build` as an object.
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from deployments.catalog.deployment import Catalog
from deployments.config import Args
from deployments.ingress.deployment import Ingress
from deployments.model.allocator import CPU_MEMORY
from deployments.model.deployment import Model
from deployments.room import LEAST_ROWS
from deployments.router import NamedReplica

# Rows queue in the model's own planner, so Serve must hand them over instead of holding them.
_MAX_ONGOING = 1024
_ROUTER: dict[str, Any] = {"request_router_class": NamedReplica}
# A line a request costs a tenth of what serving it does, and metrics count them.
_LOGGING = LoggingConfig(enable_access_log=False)
_NVIDIA = Path("/dev/nvidia0")
# How long a replica that stops still takes requests from callers that have not heard of it. They
# hear within milliseconds, and of Serve's default, 2 s, most of a stop would consist.
_LEAVING_S = 0.5

# Else each thread of a pool has a heap of its own, with holes where bodies of uploads lay
# (docs/adr/0004). The model has its own settings.
_ONE_HEAP = {"env_vars": {"MALLOC_ARENA_MAX": "1"}}

# A replica is replaced when three checks in a row have failed. A check asks no more than what its
# event loop knows; the timeout is for one that does not turn at all.
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 1.0, 5.0
# What a YAML says lies over this. Without it, Serve would tell nobody that a YAML does not say
# anything any more, and replicas that start later would differ from those that run.
_USER_CONFIG: dict[str, Any] = {}


def build(args: Args) -> Application:
    """Wire the deployments.

    Raises:
        ConfigError: A key is unknown or a value wrong; the sentence names it.
    """
    args = args.absolute().on(_device(args))
    actor_options: dict[str, Any] = {"num_cpus": args.num_cpus or 1, "num_gpus": args.gpus}
    if args.device == "cpu":
        actor_options["runtime_env"] = {"env_vars": CPU_MEMORY}
    scaling = (
        {"num_replicas": args.num_replicas or 1}
        if args.max_replicas is None
        else {
            "autoscaling_config": {
                "min_replicas": 1 if args.min_replicas is None else args.min_replicas,
                "max_replicas": args.max_replicas,
                "policy": {"policy_function": "deployments.scaling:replicas_for"},
            }
        }
    )
    model = serve.deployment(
        name="Model",
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_wait_loop_s=_LEAVING_S,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        ray_actor_options=actor_options,
        user_config=_USER_CONFIG,
        # The ingress has placed the rows; it names the replica.
        request_router_config=RequestRouterConfig(**_ROUTER),
        logging_config=_LOGGING,
        **scaling,
    )(Model)
    bound = model.bind(args)
    # One replica: there is one writer. It computes nothing, so it reserves no CPU.
    catalog = serve.deployment(
        name="Catalog",
        num_replicas=1,
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_wait_loop_s=_LEAVING_S,
        ray_actor_options={"num_cpus": 0, "runtime_env": _ONE_HEAP},
        logging_config=_LOGGING,
    )(Catalog)
    # The HTTP application is made in the replica, by Ingress.__serve_build_asgi_app__.
    ingress = serve.deployment(
        name="Ingress",
        # More than its room lets in: what Serve holds back waits in the order it came, the requests
        # of all tasks behind those of one.
        max_ongoing_requests=args.max_rows_on_the_way // LEAST_ROWS + _MAX_ONGOING,
        user_config=_USER_CONFIG,
        graceful_shutdown_wait_loop_s=_LEAVING_S,
        ray_actor_options={"runtime_env": _ONE_HEAP},
        logging_config=_LOGGING,
    )(serve.ingress(None)(Ingress))
    return ingress.bind(bound, catalog.bind(bound, args), args)


def _device(args: Args) -> str:
    """Decide `auto` once for all replicas: two kinds of them would answer a task differently."""
    if args.device != "auto":
        return args.device
    if args.num_gpus is not None:
        return "cuda" if args.num_gpus else "cpu"
    # `serve run` calls the builder before it has a cluster to ask.
    here = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else _NVIDIA.exists()
    return "cuda" if here else "cpu"
