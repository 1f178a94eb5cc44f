"""Rows in, answers out, in as few messages as there can be. Knows no Ray and no torch."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

from adapters.errors import AdapterError
from deployments.errors import BatchLoopDied, Overloaded
from deployments.model.news import News
from deployments.room import Room
from deployments.rows import Answer, Parcel, Reply, Row, Tokens

logger = logging.getLogger("ray.serve")

# Of one reply: messages are capped at 4 MB in throughput mode.
_MAX_REPLY_SCORES = 2**18
# An ingress that has not asked for so long, and has nothing to come, is gone.
_FORGOTTEN_S = 300.0


class Box:
    """What one ingress has here: rows that are on their way, and answers that wait for it."""

    def __init__(self) -> None:
        """Start empty."""
        self.rows: dict[int, asyncio.Future[Any] | None] = {}  # None until it is in the queue
        self.ready: deque[tuple[int, Answer]] = deque()
        self.failed: list[tuple[list[int], Exception]] = []
        self.waiting: asyncio.Future[None] | None = None  # of the call that waits for answers
        self.seen_s = time.monotonic()

    @property
    def has_news(self) -> bool:
        """Whether there is something to reply with."""
        return bool(self.ready or self.failed)

    def wake(self) -> None:
        """Have the waiting call reply, if there is one."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def forget(self, gone: Sequence[int]) -> None:
        """Drop rows whose callers have gone, if their forward has not begun."""
        for row in gone:
            answer = self.rows.pop(row, None)
            if answer is not None:
                answer.cancel()

    def settle(self, row: int, answer: Answer | Exception) -> None:
        """Take the answer of a row, unless its caller has gone."""
        if row not in self.rows:
            return
        del self.rows[row]
        if isinstance(answer, Exception):
            self.failed.append(([row], answer))
        else:
            self.ready.append((row, answer))
        self.wake()

    def take(self) -> tuple[list[tuple[int, Answer]], list[tuple[list[int], Exception]]]:
        """Remove what is ready, as much as one message holds."""
        failed, self.failed = self.failed, []
        taken: list[tuple[int, Answer]] = []
        num_scores = 0
        while self.ready and num_scores <= _MAX_REPLY_SCORES:
            answer = self.ready[0][1]
            num_scores += _num_scores(answer)
            if taken and num_scores > _MAX_REPLY_SCORES:
                break
            taken.append(self.ready.popleft())
        return taken, failed


class _Sent(NamedTuple):
    """A row on its way to the queue; see `deployments.rows.Row`."""

    tokens: Tokens
    request: int
    deadline_s: float | None


class Ways(NamedTuple):
    """How a replica answers a row.

    Attributes:
        pin: Holds a version in a slot, which it yields; raises AdapterError.
        enter: Puts a row into the queue; the future has its prediction, or what befell it.
        as_data: Turns a prediction, or what befell the row alone, into its answer; raises the rest.
        promise: Hears in how many seconds rows of a task should be answered.
    """

    pin: Callable[[str, str], AbstractAsyncContextManager[int]]
    enter: Callable[[Row], asyncio.Future[Any]]
    as_data: Callable[[Any], Answer]
    promise: Callable[[str, float], None]


class Exchange:
    """Takes rows of ingresses and replies with all answers that are ready. One event loop's.

    At most one call of an ingress waits. It is replied to as soon as any answer of that ingress is
    ready, with all that are; or when the next call comes, with what there is, so that the ingress
    knows that its rows have arrived. No answer waits for another.

    Attributes:
        replica: Whose it is.
    """

    def __init__(self, replica: str, ways: Ways, news: News, room: Room) -> None:
        """Take this replica's name, how rows are answered, what is resident, and room for rows."""
        self.replica = replica
        self._ways = ways
        self._news = news
        self._room = room
        self._boxes: dict[str, Box] = {}
        self._running: set[asyncio.Task[None]] = set()

    async def call(
        self, ingress: str, heard: int, parcels: Sequence[Parcel], gone: Sequence[int]
    ) -> Reply:
        """Take rows, and reply when there is an answer, or another call.

        Args:
            ingress: Whose rows they are.
            heard: The number of the last change of residents that it has heard of.
            parcels: Rows.
            gone: Ids of rows that nobody waits for any more.
        """
        box = self._boxes.get(ingress)
        if box is None:
            self._clear()
            box = self._boxes[ingress] = Box()
        box.seen_s = time.monotonic()
        box.forget(gone)
        for parcel in parcels:
            self._begin(ingress, box, Parcel(*parcel))
        box.wake()
        if box.rows and not box.has_news:
            box.waiting = waiting = asyncio.get_running_loop().create_future()
            try:
                await waiting
            finally:
                if box.waiting is waiting:
                    box.waiting = None
        answers, failed = box.take()
        return {
            "replica": self.replica,
            "answers": answers,
            "failed": failed,
            "residency": self._news.since(heard),
        }

    def not_taken(self) -> Reply:
        """Reply to a call that was meant for another replica."""
        return {"replica": self.replica, "answers": [], "failed": [], "residency": None}

    def _begin(self, ingress: str, box: Box, parcel: Parcel) -> None:
        try:
            self._room.take(parcel.task, len(parcel.rows))
        except Overloaded as error:
            box.failed.append(([row[0] for row in parcel.rows], error))
            return
        if parcel.latency_target_ms is not None:
            self._ways.promise(parcel.task, parcel.latency_target_ms / 1000)
        now_s = time.monotonic()
        rows = {
            number: _Sent(
                Tokens(ids, type_ids),
                hash((ingress, question)),
                None if left_s is None else now_s + left_s,
            )
            for number, ids, type_ids, question, left_s in parcel.rows
        }
        box.rows.update(dict.fromkeys(rows))
        running = asyncio.get_running_loop().create_task(self._answer(box, parcel, rows))
        self._running.add(running)
        running.add_done_callback(self._running.discard)

    async def _answer(self, box: Box, parcel: Parcel, rows: Mapping[int, _Sent]) -> None:
        """Have a parcel's rows answered while its version is pinned, once for all of them."""
        inside = len(rows)

        def out() -> None:
            nonlocal inside
            if inside:
                inside -= 1
                self._room.give_back(parcel.task, 1)

        try:
            async with self._ways.pin(parcel.task, parcel.version) as slot:
                await self._through_the_queue(box, parcel, rows, slot, out)
        except Exception as error:
            told: Exception = error
            if not isinstance(error, (AdapterError, BatchLoopDied)):
                logger.error("%s@%s failed", parcel.task, parcel.version, exc_info=error)
                told = RuntimeError(
                    "the model failed; its log says why"
                )  # the other may not pickle
            for row in rows:
                box.settle(row, told)
        finally:
            rest, inside = inside, 0
            if rest:
                self._room.give_back(parcel.task, rest)

    async def _through_the_queue(
        self,
        box: Box,
        parcel: Parcel,
        rows: Mapping[int, _Sent],
        slot: int,
        out: Callable[[], None],
    ) -> None:
        left = 0
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def ended(row: int, prediction: asyncio.Future[Any]) -> None:
            nonlocal left
            left -= 1
            out()
            if not left and not over.done():
                over.set_result(None)
            if not prediction.cancelled():
                box.settle(row, self._to_answer(prediction))

        for row, (tokens, request, deadline_s) in rows.items():
            if row not in box.rows:
                continue  # its caller has gone while the version loaded
            kind, share, priority = parcel.problem_type, parcel.task, parcel.priority
            entered = self._ways.enter(
                Row(slot, tokens, kind, share, request, priority, deadline_s)
            )
            box.rows[row] = entered
            left += 1
            entered.add_done_callback(lambda done, row=row: ended(row, done))  # type: ignore[misc]
        if left:
            await over

    def _to_answer(self, prediction: asyncio.Future[Any]) -> Answer | Exception:
        try:
            return self._ways.as_data(prediction.exception() or prediction.result())
        except Exception as error:
            return error

    def _clear(self) -> None:
        """Forget ingresses that are gone; called when another comes."""
        before_s = time.monotonic() - _FORGOTTEN_S
        for name, box in [*self._boxes.items()]:
            if box.seen_s < before_s and box.waiting is None and not box.rows:
                del self._boxes[name]


def _num_scores(answer: Answer) -> int:
    if isinstance(answer, str) or not answer:
        return 1
    first = answer[0]
    return len(answer) * (len(first) if isinstance(first, list) else 1)
