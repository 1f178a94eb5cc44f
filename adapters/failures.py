"""Failures that are told again instead of being found out again. No torch."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class _Failure:
    error: Exception
    mark: Hashable
    wait_s: float
    until_s: float


class Failures:
    """What went wrong, by name, until it is worth another try.

    That is when what it was about has changed, or a time has passed that doubles with every
    failure in a row. Owned by one event loop.
    """

    def __init__(
        self,
        *,
        first_s: float = 1.0,
        longest_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take how long a failure holds: the first of a row, and at most; in seconds."""
        self._first_s = first_s
        self._longest_s = longest_s
        self._clock = clock
        self._failures: OrderedDict[str, _Failure] = OrderedDict()  # oldest first

    def holding(self) -> Iterator[tuple[str, Exception, float]]:
        """Yield name, error and seconds left of every failure that would be told again."""
        now_s = self._clock()
        for name, failure in self._failures.items():
            if now_s < failure.until_s:
                yield name, failure.error, failure.until_s - now_s

    def forget(self, name: str) -> None:
        """Forget a failure; there need not be one."""
        self._failures.pop(name, None)

    @contextmanager
    def remembering(self, name: str, mark: Hashable) -> Iterator[None]:
        """Try something again only if it is worth it.

        Args:
            name: What is tried.
            mark: What it depends on, as an `adapters.store.Look` does; another one is worth a try.

        Raises:
            Exception: What the block raised, or had raised the last time.
        """
        last = self._failures.get(name)
        if last is not None and last.mark == mark and self._clock() < last.until_s:
            # A new one each time: an error that is raised again and again keeps every traceback.
            raise copy.copy(last.error)
        try:
            yield
        except Exception as error:
            again = last is not None and last.mark == mark
            wait_s = min(2 * last.wait_s, self._longest_s) if last and again else self._first_s
            until_s = self._clock() + wait_s
            self._failures.pop(name, None)
            self._failures[name] = _Failure(copy.copy(error), mark, wait_s, until_s)
            if len(self._failures) > _REMEMBERED:
                self._failures.popitem(last=False)
            raise
        self._failures.pop(name, None)
