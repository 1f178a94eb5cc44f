"""The application without a forward, and without the way to it: the ingress answers with zeros.

Its routes parse, check and tokenise a request and shape the answer as ever; what is missing is the
handle call, and whatever stands in front of it.
"""

# No `from __future__ import annotations` here: Ray reads the annotation of `build` as an object.
from typing import Any
from unittest.mock import patch

from ray.serve import Application

from deployments.config import Args
from deployments.ingress import deployment
from deployments.ingress.calls import Answers, Encodings
from deployments.ingress.handles import ModelHandle
from deployments.rows import Facts

LABELS = 2


class Nobody(ModelHandle):
    """The model replicas for all but predictions, which nobody is asked for."""

    async def predict(
        self, facts: Facts, inputs: Encodings, deadline_s: float | None = None
    ) -> Answers:
        return [[0.0] * LABELS for _ in inputs]


class NoHop(deployment.Ingress):
    """An ingress of tasks of two labels that asks nobody for scores."""

    async def __init__(self, *args: Any) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        with patch.object(deployment, "ModelHandle", Nobody):
            await super().__init__(*args)  # type: ignore[misc]


def build(args: Args) -> Application:
    """Wire the application without a forward, with this ingress."""
    from benchmarks.noop import hop  # here, since it imports torch and the ingress has none
    from deployments import app

    with patch.object(app, "Ingress", NoHop):
        return hop.build(args)
