"""When Python looks for cycles of garbage in a process that answers requests.

All else is freed when its last reference goes, and requests leave no cycles behind, those that fail
neither (`tests/ingress/test_garbage.py`). Every 700 new objects, which is the default, Python would
look through the young ones, and soon through all that there are: beside 4,000 requests on their way
that took 0.3 s, twice a second, in which nobody was answered.
"""

from __future__ import annotations

import gc

# So many objects more than after the last look, which those of 2,000 requests are not; and how many
# such looks before older ones are looked through too.
_THRESHOLDS = (500_000, 2, 2)


def look_seldom() -> None:
    """Set when this process looks."""
    gc.set_threshold(*_THRESHOLDS)
