"""How much goes into a forward so that none takes longer than about a second. Plain Python."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from deployments.config import Args
from deployments.model.planner import Planner

# What the first forward may have, of which nothing is known: a decoder on a CPU takes tens of
# milliseconds a token.
_FIRST_TOKENS = 64


class Budget:
    """A planner whose token budget follows how long forwards took.

    A forward of twice the tokens takes at most about twice as long, since its fixed cost stays: so
    the seconds a token of the last forwards bound the next one. A small forward bounds it too
    tightly, and the larger one that follows tells better; where a single row takes more than half
    of the limit, rows go one by one.
    """

    def __init__(self, planner: Planner, max_forward_s: float = 1.0) -> None:
        """Start with a small budget.

        Args:
            planner: Picks batches, under `max_tokens` at most.
            max_forward_s: What a forward may take; a single row may take longer.
        """
        self._planner = planner
        self._max_forward_s = max_forward_s
        # The faster of two counts: one forward may be held up by anything.
        self._tokens_per_s: deque[float] = deque(maxlen=2)

    @property
    def most_tokens(self) -> int:
        """Most tokens of any forward, padded."""
        return self._planner.max_tokens

    @property
    def max_tokens(self) -> int:
        """Most tokens of the next forward, padded."""
        if not self._tokens_per_s:
            return min(_FIRST_TOKENS, self.most_tokens)
        return min(int(self._max_forward_s * max(self._tokens_per_s)), self.most_tokens)

    def pick(self, lengths: Sequence[int]) -> list[int]:
        """Choose the next batch, see `Planner.pick`."""
        return replace(self._planner, max_tokens=self.max_tokens).pick(lengths)

    def note(self, lengths: Sequence[int], seconds: float) -> None:
        """Learn from a forward.

        Args:
            lengths: Tokens of the rows that went through it; none if it did not run.
            seconds: What it took.
        """
        if lengths:
            self._tokens_per_s.append(len(lengths) * max(lengths) / max(seconds, 1e-6))


def make_planner(args: Args, *, on_cpu: bool) -> Budget:
    """Return the planner for a device.

    On a CPU more than about a thousand tokens leave its caches and take longer a token, and a
    forward has little fixed cost: less padding is better (benchmarks/padding.py).
    """
    tokens = args.max_batch_tokens
    if tokens == "auto":
        tokens = 1024 if on_cpu else 16384
    planner = Planner(args.max_batch_rows, tokens)
    if on_cpu:
        planner = replace(planner, max_stretch=1.25, short_tokens=8)
    return Budget(planner)
