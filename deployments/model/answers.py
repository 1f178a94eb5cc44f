"""What became of a row, as the caller is told it."""

from __future__ import annotations

import logging

from deployments.errors import BatchLoopDied
from deployments.model.engine import BadRow, EmptySlot
from deployments.model.scores import are_finite
from deployments.rows import Answer, Prediction

logger = logging.getLogger("ray.serve")


def as_data(answer: Prediction | BaseException) -> Answer:
    """Return a row's scores, or a sentence where it alone failed.

    Raises:
        BatchLoopDied: This replica cannot answer it, and another can.
    """
    if isinstance(answer, Prediction):
        if are_finite(answer.scores):
            return answer.scores
        return "its scores are no numbers (NaN or infinity): the adapter's weights are broken"
    if isinstance(answer, EmptySlot):  # not the caller's fault, and another replica can answer
        raise BatchLoopDied(str(answer)) from answer
    if isinstance(answer, BadRow):
        return str(answer)
    if isinstance(answer, BatchLoopDied) or not isinstance(answer, Exception):
        raise answer
    logger.error("an input could not be answered", exc_info=answer)
    return "this input could not be answered; the server's log says why"
