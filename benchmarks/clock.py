"""Where a forward's time goes: the engine's functions, watched from outside."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from deployments.model import engine as engine_module
from deployments.model.engine import Engine
from deployments.model.sites import HeadSite, Site

Now = Callable[[], float]


class Clock:
    """Charges every moment of one thread to one stage: the one that was entered last."""

    def __init__(self, now: Now = time.perf_counter) -> None:
        self._now = now
        self._entered: list[str] = []
        self._since = 0.0
        self.seconds: Counter[str] = Counter()

    def within(self, stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a work that is charged to a stage, but for what is charged to stages inside."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._charge()
            self._entered.append(stage)
            try:
                return work(*args, **kwargs)
            finally:
                self._charge()
                self._entered.pop()

        return watched

    def _charge(self) -> None:
        now = self._now()
        if self._entered:
            self.seconds[self._entered[-1]] += now - self._since
        self._since = now


@contextmanager
def watched(engine: Engine, clock: Clock) -> Iterator[None]:
    """Charge all of `Engine.predict` to stages for a while.

    `base` is the base's modules, `LoRA` all else that sites do: looking for changed rows, gathering
    and products. `head` is what follows the encoder, and a pooler that adapters bring; `post` the
    scores; `pack` the rest: checks, sorting, padding, and finding each row's pages. What puts rows
    behind one another within the base's layers, on a CPU, is part of `base`.
    """
    encoder = engine.encoder
    places: list[tuple[Any, str, str]] = [
        (engine, "predict", "pack"),
        (engine_module, "to_predictions", "post"),
        (encoder, "forward", "head"),
        (encoder.bank, "route", "pack"),
        (encoder.bank, "own", "pack"),
        (encoder.model.base_model, "forward", "base"),
    ]
    for module in encoder.model.modules():
        if isinstance(module, Site):
            places += [(module, "forward", "LoRA"), (module.module, "forward", "base")]
        elif isinstance(module, HeadSite):
            places.append((module, "forward", "head"))
    with ExitStack() as stack:
        for owner, name, stage in places:
            work = clock.within(stage, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, work))
        yield
