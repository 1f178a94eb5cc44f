"""What a replica loads and runs before it takes traffic: its first callers need not wait."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Sequence

from deployments.model.budget import Budget
from deployments.model.engine import Engine
from deployments.model.fitting import DoesNotFit
from deployments.model.residents import Residents
from deployments.rows import Row, Tokens

logger = logging.getLogger("ray.serve")
# Lengths of rows in tokens, each of which goes alone and in a batch; longer ones are compiled, and
# their memory is found, when they come.
_LENGTHS = (8, 16, 32, 64, 128, 256)
# A device on which this has taken longer is not warmed any further.
_MAX_S = 10.0
# Versions that are brought at a time: each may wait for the store.
_AT_ONCE = 4


async def bring(residents: Residents, names: Sequence[str], most_s: float) -> None:
    """Bring versions into free slots; what cannot be had is left for its first request.

    Args:
        residents: Of the replica.
        names: `task@version` of each, the most wanted first.
        most_s: How long that may take, in seconds; what is not there by then is left likewise.
    """
    # The most wanted are in the last few, so that they are the last to leave if pages do not last.
    wanted = names[: residents.slots.slots_free][::-1]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(most_s):
            for first in range(0, len(wanted), _AT_ONCE):
                some = [name.split("@") for name in wanted[first : first + _AT_ONCE]]
                loads = (residents.warm(task, version) for task, version in some)
                await asyncio.gather(*loads, return_exceptions=True)


def warm_up(engine: Engine, planner: Budget, slots: Sequence[int], max_length: int) -> None:
    """Run batches of several shapes, and let the planner learn how long they take.

    Args:
        engine: On its device's thread.
        planner: Limits the batches, and is told.
        slots: Of residents, which the rows are for in turn; without any the plain base runs.
        max_length: Most tokens of a row that the base can take.

    Raises:
        DoesNotFit: Not even the shortest row alone fits into memory. What else does not fit is not
            asked for again: the planner learns of it.
    """
    started_s = time.perf_counter()
    for length in _LENGTHS:
        if length > max_length or time.perf_counter() - started_s > _MAX_S:
            return
        for num_rows in (1, planner.rows_of(length)):
            began_s = time.perf_counter()
            try:
                _run(engine, slots, num_rows, length)
            except DoesNotFit as error:
                if num_rows * length == _LENGTHS[0]:
                    raise
                logger.warning("warm-up: %s", error)
                planner.note_too_large([length] * num_rows)
                break
            planner.note([length] * num_rows, time.perf_counter() - began_s)


def _run(engine: Engine, slots: Sequence[int], num_rows: int, length: int) -> None:
    if not slots:
        engine.gives_numbers(num_rows, length)
        return
    ids = [1 + n % (engine.num_ids - 1) for n in range(length)]
    in_turn = itertools.islice(itertools.cycle(slots), num_rows)
    engine.predict([Row(slot, Tokens(ids)) for slot in in_turn])
