"""`@dynamic_batch`: a batch forms while the previous one runs, from everything that waits.

Unlike `@serve.batch` there is no timer and no frozen batch: a lone row runs at once, and when a
forward ends the planner picks the next batch from the whole queue.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from deployments.errors import BatchLoopDied

logger = logging.getLogger("ray.serve")


class Sized(Protocol):
    """A row of known length."""

    @property
    def num_tokens(self) -> int:
        """Length in tokens, before padding."""


class Picks(Protocol):
    """What chooses the next batch; see `deployments.model.planner.Planner`."""

    def pick(self, lengths: Sequence[int]) -> list[int]:
        """Return indices into the lengths of all waiting rows, 0 among them."""


# Oldest rows that the planner sees: choosing among more costs the event loop milliseconds.
_WINDOW = 4096

R = TypeVar("R", bound=Sized)
A = TypeVar("A")
Forward = Callable[[list[R]], Awaitable[list[A | Exception]]]


@dataclass(slots=True)
class _Waiter:
    row: Any
    answer: asyncio.Future[Any]


class BatchQueue:
    """The queue of one instance, and the one loop that empties it."""

    def __init__(self, forward: Forward[Any, Any], planner: Picks) -> None:
        """Start the loop; needs a running event loop.

        Args:
            forward: Answers a batch, an answer a row in the same order; an Exception in a row's
                place fails that row alone.
            planner: Chooses the next batch.
        """
        self._forward = forward
        self._planner = planner
        self._waiting: list[_Waiter] = []  # oldest first
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop().create_task(self._run())
        self._loop.add_done_callback(self._died)

    def __len__(self) -> int:
        """Rows that wait; those in the running forward do not count."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether rows can still be answered."""
        return not self._loop.done()

    async def put(self, row: Any) -> Any:
        """Wait for a row's answer; cancelling this drops the row if its forward has not begun.

        Raises:
            BatchLoopDied: The loop has ended, before or while the row waited.
        """
        return await self.enter(row)

    def enter(self, row: Any) -> asyncio.Future[Any]:
        """Put a row into the queue and return the future of its answer; raises as `put`."""
        if not self.alive:
            raise BatchLoopDied("the batch loop has ended")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiter(row, answer))
        self._wake.set()
        return answer

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            batch = self._take()
            if batch:
                try:
                    await self._answer(batch)
                except BaseException as error:
                    _fail(batch, error)
                    raise

    def _take(self) -> list[_Waiter]:
        """Remove the next batch from the queue, after the rows whose callers have gone."""
        self._waiting = [waiter for waiter in self._waiting if not waiter.answer.done()]
        if not self._waiting:
            self._wake.clear()
            return []
        try:
            # With the oldest whatever the planner says: a loop that takes nothing never yields.
            window = self._waiting[:_WINDOW]
            picked = {0, *self._planner.pick([w.row.num_tokens for w in window])}
        except BaseException as error:
            _fail(self._waiting, error)
            raise
        batch = [waiter for index, waiter in enumerate(self._waiting) if index in picked]
        self._waiting = [w for index, w in enumerate(self._waiting) if index not in picked]
        return batch

    async def _answer(self, batch: list[_Waiter]) -> None:
        """Run one forward and settle its rows; if it fails whole, try each half by itself."""
        answers: list[Any]
        try:
            answers = await self._forward([waiter.row for waiter in batch])
            if len(answers) != len(batch):
                raise RuntimeError(f"a forward of {len(batch)} rows gave {len(answers)} answers")
        except Exception as error:
            # Which row is at fault is not known, and its neighbours must not share its fate.
            if len(batch) > 1:
                logger.warning("a forward of %d rows failed, trying halves: %r", len(batch), error)
                middle = len(batch) // 2
                await self._answer(batch[:middle])
                await self._answer(batch[middle:])
                return
            answers = [error]
        for waiter, answer in zip(batch, answers, strict=True):
            if waiter.answer.done():
                continue
            if isinstance(answer, Exception):
                waiter.answer.set_exception(answer)
            else:
                waiter.answer.set_result(answer)

    def _died(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        logger.error("the batch loop has ended", exc_info=error)
        _fail(self._waiting, error)
        self._waiting = []

    def close(self) -> None:
        """End the loop; whatever waits fails."""
        self._loop.cancel()


def _fail(waiters: list[_Waiter], cause: BaseException | None) -> None:
    for waiter in waiters:
        if not waiter.answer.done():
            error = BatchLoopDied("the batch loop has ended")
            error.__cause__ = cause
            waiter.answer.set_exception(error)


def dynamic_batch(
    forward: Callable[[Any, list[R]], Awaitable[list[A | Exception]]],
) -> Callable[[Any, R], Coroutine[Any, Any, A]]:
    """Turn `async def f(self, rows: list) -> list` into a method that takes one row.

    Every instance has its own queue, made at the first call, which reads `self.planner`. A call
    returns the row's answer when the one forward that it was in ends, or raises the Exception that
    stood in its place. `batch_queue(self.f)`'s `alive` belongs into `check_health`.
    """
    name = f"_{forward.__name__}_queue"

    def make(self: Any) -> BatchQueue:
        queue: BatchQueue | None = getattr(self, name, None)
        if queue is None:
            queue = BatchQueue(functools.partial(forward, self), self.planner)
            setattr(self, name, queue)
        return queue

    @functools.wraps(forward)
    async def one(self: Any, row: R) -> A:
        return await make(self).put(row)  # type: ignore[no-any-return]

    one.queue_of = lambda self: getattr(self, name, None)  # type: ignore[attr-defined]
    one.make_queue = make  # type: ignore[attr-defined]
    return one


def enter(method: Any, row: Any) -> asyncio.Future[Any]:
    """Put a row into the queue of a bound `@dynamic_batch` method, without a task that waits.

    Raises:
        BatchLoopDied: The loop has ended; the future fails likewise if it ends later.
    """
    queue: BatchQueue = method.__func__.make_queue(method.__self__)
    return queue.enter(row)


def batch_queue(method: Any) -> BatchQueue | None:
    """Return the queue behind a bound `@dynamic_batch` method, None before its first row."""
    queue: BatchQueue | None = method.__func__.queue_of(method.__self__)
    return queue
