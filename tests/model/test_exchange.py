"""Calls of ingresses over a queue that answers when the test says. No base, no Ray."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from adapters.errors import AdapterRefused
from deployments.errors import BatchLoopDied, Overloaded
from deployments.model import exchange
from deployments.model.exchange import Exchange, Ways
from deployments.model.news import News
from deployments.room import Room
from deployments.rows import Parcel, Reply, Row

KIND = "single_label_classification"


class Queue:
    """Rows by their first id; a version is pinned once its gate is open."""

    def __init__(self) -> None:
        self.rows: dict[int, asyncio.Future[Any]] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.entered: list[Row] = []
        self.promised: dict[str, float] = {}
        self.error: Exception | None = None
        self.num_pins = self.num_held = 0

    @asynccontextmanager
    async def pin(self, task: str, version: str) -> AsyncIterator[int]:
        self.num_pins += 1
        if version in self.gates:
            await self.gates[version].wait()
        if self.error is not None:
            raise self.error
        self.num_held += 1
        try:
            yield 7
        finally:
            self.num_held -= 1

    def enter(self, row: Row) -> asyncio.Future[Any]:
        assert (row.slot, row.share, row.priority) == (7, "mood", "high")
        self.entered.append(row)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.rows[row.tokens.ids[0]] = answer
        return answer

    def promise(self, task: str, target_s: float) -> None:
        self.promised[task] = target_s

    def answer(self, *firsts: int) -> None:
        for first in firsts:
            self.rows[first].set_result([float(first)])


def as_data(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.fixture
def queue() -> Queue:
    return Queue()


@pytest.fixture
def replica(queue: Queue) -> Exchange:
    return Exchange("r", Ways(queue.pin, queue.enter, as_data, queue.promise), News(), Room(100))


def call(
    replica: Exchange,
    *rows: int,
    version: str = "a",
    gone: Any = (),
    ingress: str = "one",
    left_s: float | None = None,
) -> asyncio.Task[Reply]:
    parcels = (
        [Parcel("mood", version, KIND, "high", 50, [(n, [n], None, n // 10, left_s) for n in rows])]
        if rows
        else []
    )
    return asyncio.ensure_future(replica.call(ingress, 0, parcels, gone))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_waiting_call_is_answered_with_all_that_is_ready(
    replica: Exchange, queue: Queue
) -> None:
    waiting = call(replica, 1, 2, 3)
    await settle()
    assert not waiting.done()
    queue.answer(1, 3)
    reply = await asyncio.wait_for(waiting, 1)
    assert (reply["replica"], reply["answers"], reply["failed"]) == (
        "r", [(1, [1.0]), (3, [3.0])], [],
    )  # fmt: skip
    last = call(replica)
    await settle()
    queue.answer(2)
    assert (await asyncio.wait_for(last, 1))["answers"] == [(2, [2.0])]


async def test_the_next_call_ends_the_wait_of_the_one_before(
    replica: Exchange, queue: Queue
) -> None:
    first = call(replica, 1)
    await settle()
    second = call(replica, 2)
    assert (await asyncio.wait_for(first, 1))["answers"] == []
    other = call(replica, 3, ingress="other")  # whom another ingress's calls do not concern
    await settle()
    assert not second.done()
    queue.answer(3)
    assert (await asyncio.wait_for(other, 1))["answers"] == [(3, [3.0])]
    assert not second.done()


async def test_a_cold_version_holds_back_no_other(replica: Exchange, queue: Queue) -> None:
    queue.gates["cold"] = asyncio.Event()
    cold = call(replica, 1, version="cold")
    await settle()
    warm = call(replica, 2)
    await settle()
    queue.answer(2)
    assert (await asyncio.wait_for(warm, 1))["answers"] == [(2, [2.0])]
    assert (await cold)["answers"] == []
    last = call(replica)
    queue.gates["cold"].set()
    await settle()
    queue.answer(1)
    assert (await asyncio.wait_for(last, 1))["answers"] == [(1, [1.0])]


async def test_rows_beyond_the_room_come_back_at_once_and_leave_room_for_another_task(
    queue: Queue,
) -> None:
    replica = Exchange("r", Ways(queue.pin, queue.enter, as_data, queue.promise), News(), Room(8))
    first = call(replica, 1, 2, 3)
    await settle()
    reply = await asyncio.wait_for(call(replica, 4, 5), 1)
    ((rows, error),) = reply["failed"]
    assert (rows, type(error)) == ([4, 5], Overloaded)
    await asyncio.wait_for(first, 1)
    assert set(queue.rows) == {1, 2, 3}
    call(replica, 6)
    await settle()
    assert 6 in queue.rows
    call(replica, gone=(1,))
    queue.answer(2, 3, 6)
    await settle()
    call(replica, 7, 8, 9, 10, ingress="other")
    await settle()
    assert set(queue.rows) == {1, 2, 3, 6, 7, 8, 9, 10}


async def test_a_row_that_is_answered_leaves_its_room_to_another_one(queue: Queue) -> None:
    replica = Exchange("r", Ways(queue.pin, queue.enter, as_data, queue.promise), News(), Room(8))
    call(replica, 1, 2, 3, 4)
    await settle()
    queue.answer(2)  # and not the others that came with it
    await settle()
    call(replica, 5)
    await settle()
    assert 5 in queue.rows
    call(replica, gone=(1, 3, 4, 5))
    await settle()
    call(replica, 6, 7, 8, 9)
    await settle()
    assert {6, 7, 8, 9} <= set(queue.rows)


async def test_what_the_queue_goes_by_comes_with_every_row(replica: Exchange, queue: Queue) -> None:
    before_s = time.monotonic()
    call(replica, 10, 11, 20, left_s=5.0)
    call(replica, 12, ingress="other")
    await settle()
    assert queue.promised == {"mood": 0.05}
    first, same, second, others = queue.entered
    assert first.request == same.request
    assert len({first.request, second.request, others.request}) == 3
    for row in (first, same, second):
        assert row.deadline_s is not None
        assert before_s + 5 <= row.deadline_s <= time.monotonic() + 5
    assert others.deadline_s is None


async def test_gone_rows_are_dropped_in_the_queue_and_before_it(
    replica: Exchange, queue: Queue
) -> None:
    queue.gates["cold"] = asyncio.Event()
    call(replica, 1, 2)
    call(replica, 3, 4, version="cold")
    await settle()
    call(replica, gone=(1, 3))
    await settle()
    assert queue.rows[1].cancelled()
    queue.gates["cold"].set()
    await settle()
    assert set(queue.rows) == {1, 2, 4}
    queue.answer(2, 4)
    await settle()
    assert queue.num_held == 0


async def test_a_parcel_pins_its_version_once_until_its_last_row_is_answered(
    replica: Exchange, queue: Queue
) -> None:
    call(replica, *range(1, 9))
    await settle()
    queue.answer(*range(1, 8))
    await settle()
    assert (queue.num_pins, queue.num_held) == (1, 1)
    queue.answer(8)
    await settle()
    assert queue.num_held == 0


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (AdapterRefused("mood", ["no head"]), AdapterRefused),
        (BatchLoopDied("over"), BatchLoopDied),
        (TypeError("a bug"), RuntimeError),  # which callers are not told more of
    ],
)
async def test_a_version_that_cannot_be_pinned_fails_its_rows_alone(
    replica: Exchange, queue: Queue, error: Exception, told: type[Exception]
) -> None:
    queue.error = error
    reply = await asyncio.wait_for(call(replica, 1, 2), 1)
    failed = [*reply["failed"]]
    if len(failed) < 2:
        failed += (await asyncio.wait_for(call(replica), 1))["failed"]
    assert [rows for rows, _ in failed] == [[1], [2]]
    assert all(type(one) is told for _, one in failed)


async def test_a_row_that_another_replica_could_answer_comes_back_with_the_error(
    replica: Exchange, queue: Queue
) -> None:
    waiting = call(replica, 1, 2)
    await settle()
    queue.rows[1].set_exception(BatchLoopDied("over"))
    queue.answer(2)
    reply = await asyncio.wait_for(waiting, 1)
    assert reply["answers"] == [(2, [2.0])]
    ((rows, error),) = reply["failed"]
    assert (rows, type(error)) == ([1], BatchLoopDied)


async def test_no_reply_is_larger_than_a_message(
    replica: Exchange, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_MAX_REPLY_SCORES", 3)
    waiting = call(replica, *range(1, 8))
    await settle()
    queue.answer(*range(1, 8))
    sizes = []
    while sum(sizes) < 7:
        sizes.append(len((await asyncio.wait_for(waiting, 1))["answers"]))
        waiting = call(replica)
    assert sizes == [3, 3, 1]


def test_news_tell_what_was_missed_and_all_to_who_missed_too_much() -> None:
    news = News()
    assert news.since(0) is None
    news.came(1, "a@1", ())
    news.came(2, "b@1", ())
    assert news.since(0) == {
        "number": 2, "whole": True, "held": {"a@1": True, "b@1": True}, "crowded": False,
    }  # fmt: skip
    news.came(1, "c@1", [1])
    told = news.since(2)
    assert told == {
        "number": 4, "whole": False, "held": {"a@1": False, "c@1": True}, "crowded": True,
    }  # fmt: skip
    assert news.since(4) is None
    for _ in range(3000):
        news.came(1, "d@1", [1])
    late = news.since(2)
    assert late is not None
    assert late["whole"]
    assert late["held"] == {"b@1": True, "d@1": True}
    # Of an ingress that heard another replica of the same name, or of nobody's.
    assert news.since(10**9) == {**late, "number": late["number"]}
