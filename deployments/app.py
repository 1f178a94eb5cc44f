"""The application: `serve run deployments.app:build base_model=… adapter_store=…`."""

# No `from __future__ import annotations` here: Ray reads the annotation of `build` as an object.
from ray import serve
from ray.serve import Application

from deployments.config import Args
from deployments.ingress.deployment import Ingress
from deployments.model.deployment import Model

# Rows queue in the model's own planner, so Serve must hand them over instead of holding them.
_MAX_ONGOING = 1024


def build(args: Args) -> Application:
    """Wire the deployments.

    Raises:
        ConfigError: A key is unknown or a value wrong; the sentence names it.
    """
    args = args.absolute()
    actor_options = {"num_cpus": args.num_cpus or 1, "num_gpus": args.gpus}
    scaling = (
        {"num_replicas": args.num_replicas or 1}
        if args.max_replicas is None
        else {
            "autoscaling_config": {
                "min_replicas": 1 if args.min_replicas is None else args.min_replicas,
                "max_replicas": args.max_replicas,
                "target_ongoing_requests": _MAX_ONGOING // 16,
            }
        }
    )
    model = serve.deployment(
        name="Model",
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options=actor_options,
        **scaling,
    )(Model)
    # The HTTP application is made in the replica, by Ingress.__serve_build_asgi_app__.
    ingress = serve.deployment(name="Ingress", max_ongoing_requests=_MAX_ONGOING)(
        serve.ingress(None)(Ingress)
    )
    return ingress.bind(model.bind(args), args)
