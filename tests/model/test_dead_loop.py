import asyncio
from dataclasses import dataclass
from typing import Any

import pytest

from adapters.rules import Priority
from deployments.model.deployment import Model
from deployments.model.dynamic_batch import BatchLoopDied, batch_queue, dynamic_batch
from deployments.model.health import Health
from deployments.model.planner import Filling, Planner


@dataclass(frozen=True)
class Line:
    num_tokens: int = 5
    share: str = "a"
    request: int = 0
    priority: Priority = "normal"
    deadline_s: float | None = None


class Mortal:
    """Its forward runs once it is `open`, and then raises `fault`."""

    def __init__(self, fault: BaseException | None = None) -> None:
        self.planner: Any = Planner(max_rows=64, max_tokens=10**6)
        self.fault = fault
        self.open = asyncio.Event()

    @dynamic_batch
    async def answer(self, lines: list[Line]) -> list[Any]:
        await self.open.wait()
        if self.fault is not None:
            raise self.fault
        return list(lines)

    async def running(self) -> "list[asyncio.Task[Any]]":
        """Put a row into a forward that waits to be opened, and two into the queue."""
        calls = [asyncio.ensure_future(self.answer(Line()))]
        await settle()
        calls += [asyncio.ensure_future(self.answer(Line())) for _ in range(2)]
        await settle()
        return calls


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def dies(mortal: Mortal, calls: "list[asyncio.Task[Any]]") -> list[BaseException | None]:
    """Every call fails, and so does every later one, at once; return what caused it."""
    done, pending = await asyncio.wait(calls, timeout=5)
    assert not pending
    errors = [call.exception() for call in calls]
    assert [type(error) for error in errors] == [BatchLoopDied] * len(done)
    queue = batch_queue(mortal.answer)
    assert queue is not None
    assert not queue.alive
    assert len(queue) == 0
    with pytest.raises(BatchLoopDied):
        await asyncio.wait_for(mortal.answer(Line()), 5)
    return [error and error.__cause__ for error in errors]


class Ended(BaseException):
    pass


@pytest.mark.parametrize("fault", [Ended(), asyncio.CancelledError()])
async def test_a_forward_that_ends_the_loop_fails_all_waiters(fault: BaseException) -> None:
    mortal = Mortal(fault)
    calls = await mortal.running()
    mortal.open.set()
    causes = await dies(mortal, calls)
    assert causes[0] is fault


class BrokenPlanner:
    padded = True
    last_tokens_per_s = 0.0

    def start(self, length: int) -> Filling:
        raise ZeroDivisionError("no plan")


async def test_a_planner_that_raises_fails_all_waiters() -> None:
    mortal = Mortal()
    mortal.planner = BrokenPlanner()
    calls = [asyncio.ensure_future(mortal.answer(Line())) for _ in range(3)]
    causes = await dies(mortal, calls)
    assert [type(cause) for cause in causes] == [ZeroDivisionError] * 3


async def test_a_loop_that_is_cancelled_fails_all_waiters() -> None:
    mortal = Mortal()
    calls = await mortal.running()
    queue = batch_queue(mortal.answer)
    assert queue is not None
    assert queue.alive
    assert len(queue) == 2
    queue.close()
    await dies(mortal, calls)


async def test_an_error_that_is_no_end_leaves_the_loop_alive() -> None:
    mortal = Mortal(ValueError("one bad batch"))
    mortal.open.set()
    with pytest.raises(ValueError, match="one bad batch"):
        await mortal.answer(Line())
    mortal.fault = None
    assert await mortal.answer(Line()) == Line()


async def test_a_dead_loop_fails_the_health_check() -> None:
    model = Model.__new__(Model)  # without its base: no row gets as far as that
    model.planner = BrokenPlanner()
    model.health = Health()
    await model.check_health()
    with pytest.raises(BatchLoopDied):
        await model.answer(Line())
    await settle()
    with pytest.raises(RuntimeError, match="batch loop"):
        await model.check_health()
