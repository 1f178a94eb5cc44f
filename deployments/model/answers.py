"""What became of a row, as the caller is told it."""

from __future__ import annotations

import logging

from deployments.errors import BatchLoopDied, TooLate
from deployments.model.engine import BadRow, EmptySlot
from deployments.model.fitting import DoesNotFit
from deployments.model.scores import NoNumber
from deployments.rows import Answer, Prediction

logger = logging.getLogger("ray.serve")


def as_data(answer: Prediction | BaseException) -> Answer:
    """Return a row's scores, or a sentence where it alone failed.

    Raises:
        BatchLoopDied: It cannot be answered here, and another replica can.
    """
    if isinstance(answer, Prediction):
        return answer.scores
    if isinstance(answer, EmptySlot):  # not the caller's fault, and another replica can answer
        raise BatchLoopDied(str(answer)) from answer
    if isinstance(answer, DoesNotFit):
        return "this input alone takes more memory than the model has; shorten it"
    if isinstance(answer, (BadRow, NoNumber, TooLate)):
        return str(answer)
    if isinstance(answer, BatchLoopDied) or not isinstance(answer, Exception):
        raise answer
    logger.error("an input could not be answered", exc_info=answer)
    return "this input could not be answered; the server's log says why"
