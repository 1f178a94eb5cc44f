"""`@dynamic_batch`: a batch forms while the previous one runs, from everything that waits.

Unlike `@serve.batch` there is no timer and no frozen batch: a lone row runs at once, and when a
forward ends the planner picks the next batch from the whole queue.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from deployments.errors import BatchLoopDied, TooLate
from deployments.model.shares import Shares, Starts
from deployments.model.waiter import Waiter, Waits

logger = logging.getLogger("ray.serve")

R = TypeVar("R", bound=Waits)
A = TypeVar("A")
Forward = Callable[[list[R]], Awaitable[list[A | Exception]]]


class BatchQueue:
    """The queue of one instance, and the one loop that empties it.

    Attributes:
        running_tokens: Of the rows in the running forward, before padding; 0 if none runs.
    """

    def __init__(self, forward: Forward[Any, Any], planner: Starts) -> None:
        """Start the loop; needs a running event loop.

        Args:
            forward: Answers a batch, an answer a row in the same order; an Exception in a row's
                place fails that row alone. If it raises BatchLoopDied, no row is answered any more.
            planner: Limits each batch.
        """
        self._forward = forward
        self._planner = planner
        self._waiting = Shares(padded=planner.padded)
        self._deadlines: list[tuple[float, int, Waiter]] = []
        self._numbers = itertools.count()
        self.running_tokens = 0
        self._began_s: float | None = None
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop().create_task(self._run())
        self._loop.add_done_callback(self._died)

    def __len__(self) -> int:
        """Rows that wait; those in the running forward do not count."""
        return len(self._waiting)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens of all rows that have no answer yet, those in the running forward too."""
        return self._waiting.num_tokens + self.running_tokens

    @property
    def alive(self) -> bool:
        """Whether rows can still be answered."""
        return not self._loop.done()

    @property
    def forward_s(self) -> float:
        """For how many seconds the running forward has run, 0 if none runs."""
        return 0.0 if self._began_s is None else time.monotonic() - self._began_s

    async def put(self, row: Any) -> Any:
        """Wait for a row's answer; cancelling this drops the row if its forward has not begun.

        Raises:
            BatchLoopDied: The loop has ended, before or while the row waited.
            TooLate: Its deadline passed before its forward.
        """
        return await self.enter(row)

    def enter(self, row: Any) -> asyncio.Future[Any]:
        """Put a row into the queue and return the future of its answer; raises as `put`.

        Cancelling that drops the row, if its forward has not begun.
        """
        if not self.alive:
            raise BatchLoopDied("the batch loop has ended")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        waiter = Waiter(row, answer)
        self._waiting.add(waiter)
        answer.add_done_callback(lambda _: self._waiting.discard(waiter))
        if row.deadline_s is not None:
            heapq.heappush(self._deadlines, (row.deadline_s, next(self._numbers), waiter))
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

    def _take(self) -> list[Waiter]:
        """Remove the next batch from the queue, after the rows that nobody waits for."""
        self._expire()
        if not self._waiting:
            self._wake.clear()
            return []
        batch: list[Waiter] = []
        try:
            self._waiting.take(self._planner, batch)
        except BaseException as error:
            _fail(batch, error)
            raise
        return [waiter for waiter in batch if not waiter.answer.done()]

    def _expire(self) -> None:
        """Fail rows whose deadline has passed."""
        now_s = time.monotonic()
        while self._deadlines and (self._deadlines[0][0] <= now_s or self._deadlines[0][2].gone):
            _, _, waiter = heapq.heappop(self._deadlines)
            if not waiter.gone:
                self._waiting.discard(waiter)
                waiter.answer.set_exception(TooLate("the deadline passed before its turn came"))

    async def _answer(self, batch: list[Waiter]) -> None:
        """Run one forward and settle its rows; if it fails whole, try each half by itself."""
        answers: list[Any]
        batch = [waiter for waiter in batch if not waiter.answer.done()]
        if not batch:
            return
        try:
            answers = await self._timed([waiter.row for waiter in batch])
            if len(answers) != len(batch):
                raise RuntimeError(f"a forward of {len(batch)} rows gave {len(answers)} answers")
        except BatchLoopDied:
            raise
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

    async def _timed(self, rows: list[Any]) -> list[Any]:
        self._began_s = time.monotonic()
        self.running_tokens = sum(row.num_tokens for row in rows)
        try:
            return await self._forward(rows)
        finally:
            self._began_s, self.running_tokens = None, 0

    def _died(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        logger.error("the batch loop has ended", exc_info=error)
        _fail(self._waiting.clear(), error)

    def close(self) -> None:
        """End the loop; whatever waits fails."""
        self._loop.cancel()


def _fail(waiters: Iterable[Waiter], cause: BaseException | None) -> None:
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
