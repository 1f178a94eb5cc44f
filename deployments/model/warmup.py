"""What a replica runs before it takes traffic, so that its first callers need not wait for it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

from deployments.model.budget import Budget
from deployments.model.engine import Engine
from deployments.rows import Row, Tokens

# Lengths of rows in tokens, each of which goes alone and in a batch; longer ones are compiled, and
# their memory is found, when they come.
_LENGTHS = (8, 16, 32, 64, 128, 256)
# A device on which this has taken longer is not warmed any further.
_MAX_S = 10.0


def warm_up(engine: Engine, planner: Budget, slots: Sequence[int], max_length: int) -> None:
    """Run batches of several shapes, and let the planner learn how long they take.

    Args:
        engine: On its device's thread.
        planner: Limits the batches, and is told.
        slots: Of residents, which the rows are for in turn; without any the plain base runs.
        max_length: Most tokens of a row that the base can take.
    """
    started_s = time.perf_counter()
    for length in _LENGTHS:
        if length > max_length or time.perf_counter() - started_s > _MAX_S:
            return
        for num_rows in (1, planner.rows_of(length)):
            began_s = time.perf_counter()
            if slots:
                ids = [1 + n % (engine.num_ids - 1) for n in range(length)]
                rows = [
                    Row(slot, Tokens(ids))
                    for slot in itertools.islice(itertools.cycle(slots), num_rows)
                ]
                engine.predict(rows)
            else:
                engine.gives_numbers(num_rows, length)
            planner.note([length] * num_rows, time.perf_counter() - began_s)
