"""When those of a task who are refused should come again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

# In how many seconds at least, and at most: who waits longer has forgotten.
_LEAST_S, _MOST_S = 1, 60
# Of those who leave, so many make room for who comes again; the others for who comes anew.
_SHARE = 0.5
_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples lie evenly between whole numbers


class Line:
    """Gives everybody who is refused a time of his own, half as many a second as are answered.

    Told the same time, those who wait would come back together, ever more of them, and to refuse
    them again would take the time that answers others. Nobody is told more than twice the time for
    which others have been refused: what is known of the speed is as old as that.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with the first who is refused; takes a clock, in seconds."""
        self._clock = clock
        self._since_s = clock()
        self._num_told = 0  # rows whose times are given away
        self._num_left = 0

    def left(self, num_rows: int) -> None:
        """Count rows of the task that have left."""
        self._num_left += num_rows

    def turn(self, num_rows: int) -> int:
        """Return in how many seconds a request of so many rows should come again."""
        age_s = self._clock() - self._since_s
        before_s = self._num_told * age_s / (_SHARE * max(1, self._num_left)) - age_s
        self._num_told += num_rows
        # Whole seconds, some earlier and some later: rounded alike, all would come in every other.
        rounding = self._num_told * _GOLDEN % 1
        return math.floor(max(_LEAST_S, min(before_s, 2 * age_s, _MOST_S - 1) + rounding))
