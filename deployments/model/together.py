"""Several calls that came as one: each ends in answers, or in an error, of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterable
from typing import TypeVar

from adapters.errors import AdapterError
from deployments.errors import BatchLoopDied

logger = logging.getLogger("ray.serve")
T = TypeVar("T")


async def each_alone(calls: Iterable[Awaitable[T]]) -> list[T | Exception]:
    """Wait for all calls, and return what each returned or raised.

    What is returned can be pickled: an unknown error is logged here, and told by its name.

    Raises:
        BatchLoopDied: One of them cannot be answered by this replica, which another one can.
    """
    told: list[T | Exception] = []
    for one in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(one, BatchLoopDied):
            raise one
        if not isinstance(one, BaseException) or isinstance(one, AdapterError):
            told.append(one)
        elif isinstance(one, Exception):
            logger.error("a call among others failed", exc_info=one)
            told.append(RuntimeError(f"{type(one).__name__}; the model's log says more"))
        else:
            raise one
    return told
