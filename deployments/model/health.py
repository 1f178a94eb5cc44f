"""Whether a replica can still answer, and why not. Plain Python; it never waits for the device."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from deployments.model.dynamic_batch import BatchQueue

logger = logging.getLogger("ray.serve")
# The planner keeps forwards to about a second. One that takes this long will not end. Serve asks
# once a second, so that it is noticed within 10 s.
HUNG_S = 9.0
# A single long row may take longer: so many times what it should by its tokens, too.
_HUNG_TIMES = 8.0
# So that what the callers are told leaves before the process ends.
_LAST_WORDS_S = 1.0


class Health:
    """What was found wrong with a replica; nothing of it heals but by another one.

    Attributes:
        problem: The first that was found, None while there is none.
    """

    def __init__(self, hung_s: float = HUNG_S, end: Callable[[], None] | None = None) -> None:
        """Start healthy.

        Args:
            hung_s: A forward that takes longer hangs.
            end: Ends the process then. A thread that hangs would hold up an orderly end, and with
                it whoever waits for this device.
        """
        self.problem: str | None = None
        self._end = end
        self._hung_s = hung_s

    def lose(self, problem: str) -> None:
        """Note what is wrong, for Serve to replace this replica."""
        if self.problem is None:
            logger.error("this replica is to be replaced: %s", problem)
            self.problem = problem

    def check(self, queue: BatchQueue | None, tokens_per_s: float = 0.0) -> None:
        """Raise if no row can be answered any more.

        Rows that wait for a forward that hangs fail, so that their callers can ask elsewhere.

        Args:
            queue: The rows that wait; None before the first one.
            tokens_per_s: What the last forwards have done; 0 if there was none.

        Raises:
            RuntimeError: It says why.
        """
        if queue is not None and queue.alive and self._hangs(queue, tokens_per_s):
            self.lose(f"a forward has not ended in {queue.forward_s:.0f} s")
            queue.close()
            if self._end is not None:
                asyncio.get_running_loop().call_later(_LAST_WORDS_S, self._end)
        if self.problem is None and queue is not None and not queue.alive:
            self.lose("the batch loop has ended")
        if self.problem is not None:
            raise RuntimeError(self.problem)

    def _hangs(self, queue: BatchQueue, tokens_per_s: float) -> bool:
        expected_s = queue.running_tokens / tokens_per_s if tokens_per_s else 0.0
        return queue.forward_s > max(self._hung_s, _HUNG_TIMES * expected_s)
