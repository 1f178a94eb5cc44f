"""How much goes into a forward so that none takes longer than about a second. Plain Python."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from deployments.config import Args
from deployments.model.planner import Filling, Planner

# What the first forward may have, of which nothing is known: a decoder on a CPU takes tens of
# milliseconds a token.
_FIRST_TOKENS = 64
# A row may come when a forward has just begun, and then has its own: two of these, and some time
# for all else.
_PART_OF_TARGET = 0.4
# How long a task's latency target counts after it was asked for.
_LATELY_S = 30.0
# Shorter forwards than twice the shortest would halve what is done in a second, and gain little.
_SHORTEST, _SHORTEST_OF = 2.0, 64
# After a forward did not fit, the limit grows again by this with each that was as large as it.
_RECOVERY = 1.02
# Of what the best forward did, after this many seconds half is believed.
_BEST_HALF_LIFE_S = 600.0


class Budget:
    """A planner whose token budget follows how long forwards took.

    Tokens are counted as `Planner.tokens` does, but where something else is said.

    A forward of twice the tokens takes at most about twice as long, since its fixed cost stays: so
    the seconds a token of the last forwards bound the next one. A small forward bounds it too
    tightly, and the larger one that follows tells better; where a single row takes more than half
    of the limit, rows go one by one.
    """

    def __init__(self, planner: Planner, max_forward_s: float = 1.0) -> None:
        """Start with a small budget.

        Args:
            planner: Limits batches, to `max_tokens` at most.
            max_forward_s: What a forward may take; a single row may take longer.
        """
        self._planner = planner
        self._max_forward_s = max_forward_s
        # The faster of two counts: one forward may be held up by anything.
        self._tokens_per_s: deque[float] = deque(maxlen=2)
        self._forwards_s: deque[float] = deque(maxlen=_SHORTEST_OF)
        self._targets: dict[str, tuple[float, float]] = {}  # task -> (seconds, asked for when)
        self._fitting_tokens = float(planner.max_tokens)
        self._best, self._best_at_s = 0.0, 0.0
        self._answered, self._asked_at_s = 0, time.monotonic()

    @property
    def padded(self) -> bool:
        """Whether layers work on padding, so that rows of like length belong together."""
        return self._planner.padded

    @property
    def most_tokens(self) -> int:
        """Most tokens of any forward."""
        return self._planner.max_tokens

    @property
    def max_tokens(self) -> int:
        """Most tokens of the next forward."""
        most = int(self._fitting_tokens)
        if not self._tokens_per_s:
            return min(_FIRST_TOKENS, most)
        return min(int(self.max_forward_s * max(self._tokens_per_s)), most)

    @property
    def max_forward_s(self) -> float:
        """What the next forward may take, by the tightest target of a task that is asked."""
        since_s = time.monotonic() - _LATELY_S
        self._targets = {task: of for task, of in self._targets.items() if of[1] > since_s}
        if not self._targets or not self._forwards_s:
            return self._max_forward_s
        target_s = _PART_OF_TARGET * min(seconds for seconds, _ in self._targets.values())
        return min(self._max_forward_s, max(target_s, _SHORTEST * min(self._forwards_s)))

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, without padding, that forwards can do; 0 before the first one."""
        age_s = time.monotonic() - self._best_at_s
        return self._best * math.exp2(-age_s / _BEST_HALF_LIFE_S)

    @property
    def last_tokens_per_s(self) -> float:
        """Tokens a second of the last forwards, however long ago; 0 before the first one."""
        return max(self._tokens_per_s, default=0.0)

    def answered_tokens_per_s(self) -> float:
        """Tokens a second that were answered, without padding, since this was last asked."""
        now_s, num_tokens = time.monotonic(), self._answered
        seconds = max(now_s - self._asked_at_s, 1e-6)
        self._answered, self._asked_at_s = 0, now_s
        return num_tokens / seconds

    def promise(self, task: str, target_s: float) -> None:
        """Keep forwards short for a while: rows of a task are to be answered in so many seconds."""
        self._targets[task] = (target_s, time.monotonic())

    def limit(self, planner: Planner) -> None:
        """Change what limits the batches from the next one on; what was learned stays."""
        self._planner = planner
        self._fitting_tokens = float(planner.max_tokens)

    def rows_of(self, length: int) -> int:
        """Return how many rows of so many tokens the next forward may have, 1 at least."""
        return max(1, min(self._planner.max_rows, self.max_tokens // length))

    def start(self, length: int) -> Filling:
        """Begin a batch with a row of so many tokens, see `Planner.start`."""
        return replace(self._planner, max_tokens=self.max_tokens).start(length)

    def pick(self, lengths: Sequence[int]) -> list[int]:
        """Choose the next batch, see `Planner.pick`."""
        return replace(self._planner, max_tokens=self.max_tokens).pick(lengths)

    def note(self, lengths: Sequence[int], seconds: float) -> None:
        """Learn from a forward.

        Args:
            lengths: Tokens of the rows that went through it; none if it did not run.
            seconds: What it took.
        """
        if not lengths:
            return
        seconds = max(seconds, 1e-6)
        num_tokens = self._planner.tokens(lengths)
        self._tokens_per_s.append(num_tokens / seconds)
        self._forwards_s.append(seconds)
        if num_tokens >= self._fitting_tokens / 2:
            self._fitting_tokens = min(self._fitting_tokens * _RECOVERY, float(self.most_tokens))
        self._answered += sum(lengths)
        speed = sum(lengths) / seconds
        if speed > self.tokens_per_s:
            self._best, self._best_at_s = speed, time.monotonic()

    def note_too_large(self, lengths: Sequence[int]) -> None:
        """Learn from a forward that did not fit into memory: half of it may."""
        num_tokens = self._planner.tokens(lengths)
        self._fitting_tokens = max(1.0, min(self._fitting_tokens, num_tokens / 2))


def limits(args: Args, *, on_cpu: bool, padded: bool) -> Planner:
    """Return the most that a forward may have on a device, however fast it is.

    On a CPU more than about a thousand tokens leave its caches and take longer a token. Where
    layers see padding there, less of it is worth another forward (docs/adr/0006).

    Args:
        args: The configuration.
        on_cpu: Whether that is the device.
        padded: Whether layers work on padding there, see `Planner`.
    """
    tokens = args.max_batch_tokens
    if tokens == "auto":
        tokens = 1024 if on_cpu else 16384
    planner = Planner(args.max_batch_rows, tokens, padded=padded)
    if on_cpu:
        planner = replace(planner, max_stretch=1.25, short_tokens=8)
    return planner
