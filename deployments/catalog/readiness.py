"""What has to hold before a version answers: it is valid, in slots, and answers as promised."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from adapters.errors import AdapterRefused
from deployments.catalog.effects import Effects
from deployments.errors import BadInput
from deployments.snapshot import TaskRecord

T = TypeVar("T")


async def make_ready(
    effects: Effects, task: str, old: TaskRecord | None, new: TaskRecord, *, golden: bool = True
) -> None:
    """Validate and warm what newly may be asked for, and try what newly answers.

    Args:
        effects: Who does so.
        task: The task.
        old: Its record as it is, None if it has none.
        new: Its record as it would be.
        golden: Whether the golden.jsonl of versions that newly answer is run.

    Raises:
        BadInput: A version cannot be served with these rules, or misses its golden answers.
        NotReady: No model replica is running.
    """
    before = frozenset[str]() if old is None or old.deleted else old.in_use
    fresh = sorted(new.in_use - before)
    ruled = old is not None and old.rules != new.rules
    for version in sorted(new.in_use) if ruled else fresh:
        await checked(effects.describe(task, version, new.rules))
    switches = old is None or old.active != new.active
    # A canary has been in slots, and may have left those of a replica that never got its rows.
    for version in sorted({*fresh, new.active} if switches else fresh):
        await checked(effects.warm(task, version))
    answered = set() if old is None or old.deleted else {*old.answering}
    newly = {*new.answering} - answered | ({new.active} if switches else set())
    for version in sorted(newly) if golden else ():
        problems = await checked(effects.golden(task, version, new.rules))
        if problems:
            raise BadInput(f"{task}@{version} is not activated: {'; '.join(problems)}")


async def checked(asked: Awaitable[T]) -> T:
    """Await an effect; what cannot be served is the change's fault, and not the server's."""
    try:
        return await asked
    except AdapterRefused as error:
        raise BadInput(str(error)) from None
