import asyncio
from typing import Any

from deployments.ingress.described import Described
from deployments.snapshot import TaskRecord, VersionRecord

A = "a" * 8


def record() -> TaskRecord:
    one = VersionRecord(created_s=0, by="us", source="upload")
    return TaskRecord(revision=1, active=A, versions={A: one})


async def test_what_comes_after_its_task_was_forgotten_is_not_kept() -> None:
    asked, goes_on = asyncio.Event(), asyncio.Event()

    async def describe(*_: Any) -> Any:
        asked.set()
        await goes_on.wait()
        return {"version": A}

    described = Described(describe)
    waiting = asyncio.ensure_future(described.get("mood", A, record()))
    await asked.wait()
    described.keep("mood", (record(), None))
    assert len(described._flights) == 1, "it is still a version"
    described.keep("mood", (None, None))
    goes_on.set()
    assert await waiting == {"version": A}, "who waits is answered"
    assert not described.knows("mood")
    assert described._flights == {}
