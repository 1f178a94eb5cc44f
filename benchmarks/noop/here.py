"""The application without a forward, and without the way to it: the ingress answers with zeros.

Its routes parse, check and tokenise a request and shape the answer as ever; what is missing is the
handle call, and whatever stands in front of it.
"""

# No `from __future__ import annotations` here: Ray reads the annotation of `build` as an object.
from unittest.mock import patch

from ray.serve import Application

from adapters.rules import ProblemType
from deployments.config import Args
from deployments.ingress.deployment import Ingress
from deployments.ingress.predict import Answers, Encodings

LABELS = 2


class NoHop(Ingress):
    """An ingress of tasks of two labels that asks nobody for scores."""

    async def _ask(
        self, task: str, version: str, problem_type: ProblemType, inputs: Encodings
    ) -> Answers:
        return [[0.0] * LABELS for _ in inputs]


def build(args: Args) -> Application:
    """Wire the application without a forward, with this ingress."""
    from benchmarks.noop import hop  # here, since it imports torch and the ingress has none
    from deployments import app

    with patch.object(app, "Ingress", NoHop):
        return hop.build(args)
