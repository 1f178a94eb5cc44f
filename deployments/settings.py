"""What a running replica takes of a changed configuration: `user_config` in a Serve YAML."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from deployments.config import Args, ConfigError

logger = logging.getLogger("ray.serve")

MODEL_KEYS = ("adapter_slots", "max_host_gib", "max_batch_rows", "max_batch_tokens")
INGRESS_KEYS = ("max_request_rows", "max_request_tasks", "on_lost_catalog")


def laid_over(args: Args, user_config: Any, keys: Collection[str]) -> Args:
    """Return arguments with what `user_config` says in the place of some.

    Args:
        args: What the application was built with.
        user_config: Of one deployment; what it does not name is as in `args`.
        keys: Those that it may name.

    Raises:
        ConfigError: It names another one, or a value is wrong.
    """
    if not isinstance(user_config, dict):
        raise ConfigError(f"user_config is {user_config!r}; it must be keys with values")
    for key in user_config:
        if key not in keys:
            raise ConfigError(
                f"user_config names {key!r}, which cannot be changed in place; the keys that can "
                f"are {', '.join(keys)}"
            )
    return Args.model_validate(args.model_dump() | user_config)
