"""What can go wrong with an adapter.

    AdapterError
    ├── TaskNotFound        no folder of that name is in the store
    ├── VersionNotFound     the task has no such version
    ├── AdapterIncomplete   its folder is still being copied; worth another try
    ├── AdapterChanged      its folder no longer holds the version that was asked for
    ├── AdapterRefused      it cannot be served; carries every problem that was found
    ├── StagingTooLarge     a file on its way into the store is over its limit
    ├── StoreUnreachable    the store does not answer; worth another try
    └── BankFull            the versions that are kept leave no room for it

The base constructor gets what makes the same error again, so that they survive pickling.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_MAX_PROBLEMS, _MAX_CHARACTERS = 64, 1000
# `catalog` is a folder of the store's own.
TASK_NAME = re.compile(r"(?!catalog\Z)[a-z0-9][a-z0-9._-]{0,63}")
VERSION_NAME = re.compile(r"[0-9a-f]{8}")


class AdapterError(Exception):
    """Something is wrong with one task's adapter; every other task is unaffected."""


class TaskNotFound(AdapterError):
    """The store has no folder for this task."""

    def __init__(self, task: str) -> None:
        """Name the task that was asked for."""
        super().__init__(task)
        self.task = task

    def __str__(self) -> str:
        """Say what to do next."""
        if not TASK_NAME.fullmatch(self.task):
            return (
                f"{self.task!r} cannot be a task: a name is 1 to 64 of a-z, 0-9, '.', '_' and '-' "
                "and begins with a letter or a digit; 'catalog' is taken"
            )
        return (
            f"there is no task {self.task!r}; upload one (PUT /v1/tasks/{self.task}/versions), put "
            "its PEFT folder into the adapter store under that name, or see GET /v1/tasks for "
            "those that exist"
        )


class VersionNotFound(AdapterError):
    """The task has no version of that name."""

    def __init__(self, task: str, version: str) -> None:
        """Name both."""
        super().__init__(task, version)
        self.task = task
        self.version = version

    def __str__(self) -> str:
        """Say where the versions are listed."""
        return (
            f"task {self.task!r} has no version {self.version!r}; "
            f"GET /v1/tasks/{self.task} lists those that it has"
        )


class AdapterIncomplete(AdapterError):
    """The folder is not complete yet, most likely because it is still being copied."""

    def __init__(self, task: str, reason: str) -> None:
        """Say what is missing yet."""
        super().__init__(task, reason)
        self.task = task
        self.reason = reason

    def __str__(self) -> str:
        """Say why to wait."""
        return f"the adapter of task {self.task!r} is not complete yet: {self.reason}"


class AdapterChanged(AdapterError):
    """The folder holds another version than the one that was asked for."""

    def __init__(self, task: str, wanted: str, found: str) -> None:
        """Name both versions."""
        super().__init__(task, wanted, found)
        self.task = task
        self.wanted = wanted
        self.found = found

    def __str__(self) -> str:
        """Name both versions."""
        return (
            f"the adapter of task {self.task!r} changed from version {self.wanted} "
            f"to {self.found} while the request was on its way; send it again"
        )


class AdapterRefused(AdapterError):
    """The adapter cannot be served as it is; `problems` has one sentence each."""

    def __init__(self, task: str, problems: Sequence[str]) -> None:
        """Collect every problem, so that one look is enough to mend them all."""
        # Names out of broken files are as long as they like, and hold what they like.
        told = tuple(_printable(problem) for problem in problems[:_MAX_PROBLEMS])
        if len(problems) > _MAX_PROBLEMS:
            told = (*told[:-1], f"and {len(problems) - _MAX_PROBLEMS + 1} problems more")
        super().__init__(task, told)
        self.task = task
        self.problems = told

    def __str__(self) -> str:
        """All problems in one message."""
        return f"the adapter of task {self.task!r} was refused: {'; '.join(self.problems)}"


class StagingTooLarge(AdapterError):
    """A file that was on its way into the store is over its limit; nothing of it was kept."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        """Name the file and its limit in bytes."""
        super().__init__(name, limit_bytes)
        self.name = name
        self.limit_bytes = limit_bytes

    def __str__(self) -> str:
        """Say what the limit is."""
        return f"{self.name} is over its limit of {self.limit_bytes} bytes"


class StoreUnreachable(AdapterError):
    """The store does not answer, for no task's fault."""

    def __init__(self, url: str, reason: str) -> None:
        """Name the store, and what it or the network said."""
        super().__init__(url, _printable(reason))
        self.url = url
        self.reason = _printable(reason)

    def __str__(self) -> str:
        """Say which store."""
        return f"the store {self.url} does not answer: {self.reason}"


class BankFull(AdapterError):
    """What is pinned leaves no room for another adapter, and never leaves by itself."""

    def __init__(self, version: str, num_kept: int) -> None:
        """Name the version that found no room, and how many are kept."""
        super().__init__(version, num_kept)
        self.version = version
        self.num_kept = num_kept

    def __str__(self) -> str:
        """Say what to change."""
        return (
            f"there is no room for {self.version} beside the {self.num_kept} adapters that are "
            "pinned; raise bank_gib or adapter_slots, or pin fewer tasks"
        )


def _printable(sentence: str) -> str:
    """Cut a sentence that has no end, and escape what is no text: half a surrogate, a newline."""
    if len(sentence) > _MAX_CHARACTERS:
        sentence = sentence[: _MAX_CHARACTERS - 1] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence)
