"""When those who are refused should come again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

# In how many seconds at least, and at most: who waits longer has forgotten.
_LEAST_S, _MOST_S = 1, 60
# Over how long it is counted how fast rows leave.
_WINDOW_S = 1.0
# So many of those who leave make room for who comes again; the others for who comes anew.
_SHARE = 0.5


class RetryAfter:
    """Gives everybody who is refused a time of his own, half as many a second as are answered.

    Told the same time, those who wait would come back together, ever more of them, and to refuse
    them again would take the time that answers others.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Take a clock, in seconds."""
        self._clock = clock
        self._per_s: float | None = None  # as last counted
        self._num_left, self._since_s = 0, clock()
        self._next_s = 0.0  # by which all times before are given away

    def begin(self) -> None:
        """Start to count, since there are rows again that can leave."""
        self._num_left, self._since_s = 0, self._clock()

    def left(self, num_rows: int) -> None:
        """Count rows that have left."""
        self._num_left += num_rows
        passed_s = self._clock() - self._since_s
        if passed_s >= _WINDOW_S:
            self._per_s = self._num_left / passed_s
            self.begin()

    def turn(self, num_rows: int) -> int:
        """Return in how many seconds a request of so many rows should come again."""
        now_s = self._clock()
        turn_s = max(now_s + _LEAST_S, self._next_s)
        if self._per_s:
            self._next_s = min(turn_s + num_rows / (_SHARE * self._per_s), now_s + _MOST_S)
        return math.ceil(turn_s - now_s)
