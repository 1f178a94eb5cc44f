"""When Python looks for cycles of garbage in a process that answers requests.

All else is freed when its last reference goes. Requests leave no cycles behind here, those that
fail neither (`tests/ingress/test_garbage.py`); of one that is hung up on Serve keeps some in one.
Every 700 new objects, which is the default, Python would look through the young ones, and soon
through all that there are: beside 4,000 requests on their way that took 0.3 s, twice a second, in
which nobody was answered.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

# So many objects more than after the last look, which those of 2,000 requests are not; and how many
# such looks before older ones are looked through too.
_THRESHOLDS = (500_000, 2, 2)


def look_seldom() -> None:
    """Set when this process looks."""
    gc.set_threshold(*_THRESHOLDS)


async def look_when_calm(is_calm: Callable[[], bool], every_s: float = 10.0) -> None:
    """Look through all that came after the start while little else is on; does not return.

    So that memory does not grow for hours until there are so many objects more. Not through the
    young ones alone: what outlives a look is old, and a connection, which leaves a cycle when it
    ends, outlives many. Serve has frozen what there was at the start, so a look takes milliseconds.
    """
    while True:
        await asyncio.sleep(every_s)
        if is_calm():
            gc.collect()
