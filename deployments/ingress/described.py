"""What the model says of the versions that the catalog names."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from adapters.errors import AdapterError
from deployments.rows import Facts
from deployments.snapshot import TaskRecord

DescribeVersion = Callable[[str, str, dict[str, Any]], Awaitable[Facts]]
"""Asks a model replica what a task's version is under rules laid over its own."""

# A version's files and the rules laid over them. Beside its name when it came: one that was
# deleted and published again may have come with other rules in its folder.
_Key = tuple[str, float, bytes]


@dataclass(frozen=True, slots=True)
class _Failed:
    error: AdapterError
    until_s: float


class Described:
    """The facts of versions, each asked for once.

    Owned by one event loop. All that wait for one share its flight, which nobody's going away
    ends; a version that failed fails at once until `retry_s` later.
    """

    def __init__(self, describe: DescribeVersion, *, retry_s: float = 2.0) -> None:
        """Take who is asked, and after how many seconds once more about what failed."""
        self._describe = describe
        self._retry_s = retry_s
        self._said: dict[str, dict[_Key, Facts | _Failed]] = {}
        self._flights: dict[tuple[str, _Key], asyncio.Task[Facts]] = {}

    def peek(self, task: str, version: str, record: TaskRecord) -> Facts | None:
        """Return what is known, without asking; None if that is nothing.

        Raises:
            AdapterError: It is known that the version cannot be had.
        """
        said = self._said.get(task, {}).get(_key(version, record))
        if isinstance(said, _Failed):
            if time.monotonic() >= said.until_s:
                return None
            raise _as_new(said.error)
        return said

    async def get(self, task: str, version: str, record: TaskRecord) -> Facts:
        """Return what a version is under its record's rules.

        Raises:
            AdapterError: It cannot be had.
            NotReady: No model replica could be asked.
        """
        said = self.peek(task, version, record)
        if said is not None:
            return said
        name = (task, _key(version, record))
        flight = self._flights.get(name)
        if flight is None:
            flight = asyncio.get_running_loop().create_task(
                self._ask(task, version, record.rules, name[1])
            )
            self._flights[name] = flight
            flight.add_done_callback(lambda done: self._landed(name, done))
        try:
            return await asyncio.shield(flight)
        finally:
            del flight  # whose error has this frame in its traceback: a cycle

    def knows(self, task: str) -> bool:
        """Tell whether anything of a task was ever asked for."""
        return task in self._said

    def keep(self, task: str, records: Iterable[TaskRecord | None]) -> None:
        """Forget what is said of a task, but for its versions under these records."""
        kept = {
            _key(version, record) for record in records if record for version in record.versions
        }
        left = {key: said for key, said in self._said.get(task, {}).items() if key in kept}
        if left:
            self._said[task] = left
        else:
            self._said.pop(task, None)
        for name in [name for name in self._flights if name[0] == task and name[1] not in kept]:
            del self._flights[name]  # it answers those that wait, and nobody after them

    async def _ask(self, task: str, version: str, rules: dict[str, Any], key: _Key) -> Facts:
        said: Facts | _Failed
        try:
            said = await self._describe(task, version, rules)
        except AdapterError as error:
            said = _Failed(_as_new(error), time.monotonic() + self._retry_s)
        if self._flights.get((task, key)) is asyncio.current_task():
            self._said.setdefault(task, {})[key] = said
        if isinstance(said, _Failed):
            raise _as_new(said.error)
        return said

    def _landed(self, name: tuple[str, _Key], flight: asyncio.Task[Facts]) -> None:
        if self._flights.get(name) is flight:
            del self._flights[name]
        if not flight.cancelled():
            flight.exception()  # seen here, so that a flight that nobody waits for is no warning


def _key(version: str, record: TaskRecord) -> _Key:
    known = record.versions.get(version)
    rules = orjson.dumps(record.rules, option=orjson.OPT_SORT_KEYS) if record.rules else b""
    return version, known.created_s if known else 0.0, rules


def _as_new(error: AdapterError) -> AdapterError:
    """Return an error as ours, without Ray's traceback and those of being raised again."""
    cause = getattr(error, "cause", None)
    own = cause if isinstance(cause, AdapterError) else error
    return type(own)(*own.args)
