"""The application as it is, but for placement: of two replicas at random, the one with less to do.

That is what Ray Serve's own router does, which knows of no adapters; and no replica is remembered
to hold one.
"""

# No `from __future__ import annotations` here: Ray reads the annotation of `build` as an object.
import random
from typing import Any
from unittest.mock import patch

from ray.serve import Application

from deployments import app
from deployments.config import Args
from deployments.ingress import deployment, replicas
from deployments.ingress.placement import Placement


class TwoChoices(Placement):
    """Goes by queues alone."""

    def _choose(self, version: str, able: list[Any]) -> Any:
        some = random.sample(able, min(2, len(able)))
        return min(some, key=lambda replica: replica.load)


class Anywhere(deployment.Ingress):
    """An ingress that places rows so."""

    async def __init__(self, *args: Any) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        with patch.object(replicas, "Placement", TwoChoices):
            await super().__init__(*args)  # type: ignore[misc]


def build(args: Args) -> Application:
    """Wire the application with this ingress."""
    with patch.object(app, "Ingress", Anywhere):
        return app.build(args)
