"""Rows on their way to a replica that answers as the test says, and is held to what it is told."""

import asyncio
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import pytest

from deployments.errors import BatchLoopDied
from deployments.ingress import outbox
from deployments.ingress.calls import Question
from deployments.ingress.outbox import Asked, CallLost, Outbox, ReplicaLost
from deployments.rows import Facts, Parcel, Reply

SHORT = 32  # what a short row is to a replica
OF_REQUEST: ContextVar[str] = ContextVar("of_request", default="")


class Replica:
    """Keeps one call waiting as a model replica does; the test says when rows are answered."""

    def __init__(self) -> None:
        self.calls: list[list[Parcel]] = []
        self.gone: list[int] = []
        self.rows: dict[int, list[int]] = {}  # ids of rows that are to be answered
        self.travel_s = 0.0
        self.error: Exception | None = None
        self._ready: list[tuple[int, Any]] = []
        self._failed: list[tuple[list[int], Exception]] = []
        self._waiting: asyncio.Event | None = None

    async def exchange(self, parcels: Sequence[Parcel], gone: Sequence[int]) -> Reply:
        self.calls.append(list(parcels))
        await asyncio.sleep(self.travel_s)
        self.gone += gone
        for number in gone:
            self.rows.pop(number, None)
        for parcel in parcels:
            self.rows.update((number, ids) for number, ids, *_ in parcel.rows)
        if self._waiting is not None:
            self._waiting.set()
        mine = self._waiting = asyncio.Event()
        if not self._ready and not self._failed and self.error is None and self.rows:
            await mine.wait()
        if self.error is not None:
            raise self.error
        ready, self._ready = self._ready, []
        failed, self._failed = self._failed, []
        return {"replica": "r", "answers": ready, "failed": failed, "residency": None}

    def answer(self, *rows: int) -> None:
        """Answer rows by their first token id with that, all if none is said."""
        for number, ids in [*self.rows.items()]:
            if not rows or ids[0] in rows:
                del self.rows[number]
                self._ready.append((number, [float(ids[0])]))
        self.wake()

    def fail(self, error: Exception) -> None:
        self._failed.append(([*self.rows], error))
        self.rows.clear()
        self.wake()

    def lose(self) -> None:
        self.error = ReplicaLost("gone")
        self.wake()

    def repeat(self, *answers: tuple[int, Any]) -> None:
        self._ready += answers

    def wake(self) -> None:
        if self._waiting is not None:
            self._waiting.set()


class Box:
    """An outbox to a replica, and what it tells."""

    def __init__(self, make_facts: Callable[..., Facts]) -> None:
        self.replica = Replica()
        self.make_facts = make_facts
        self.done = 0
        self.back: list[tuple[Asked, Exception]] = []
        self.outbox = Outbox(
            self.replica.exchange, lambda reply: None, self._done, self._unanswered
        )

    def _done(self, load: int) -> None:
        self.done += load

    def _unanswered(self, rows: Sequence[Asked], error: Exception) -> None:
        self.back += [(row, error) for row in rows]

    def ask(self, *firsts: int, version: str = "a" * 8, length: int = 1) -> Question:
        inputs: Any = [([first] * length, None) for first in firsts]
        question = Question(self.make_facts(version=version), inputs)
        self.outbox.put([Asked(question, at) for at in range(len(firsts))])
        return question


@pytest.fixture
async def box(make_facts: Callable[..., Facts]) -> Box:
    return Box(make_facts)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_rows_of_one_turn_leave_in_one_call_one_parcel_a_version(box: Box) -> None:
    questions = [box.ask(n, version=f"{n % 2}" * 8) for n in range(1, 11)]
    await settle()
    ((first, second),) = box.replica.calls
    assert [ids[0] for _, ids, *_ in first.rows] == [1, 3, 5, 7, 9]
    assert [ids[0] for _, ids, *_ in second.rows] == [2, 4, 6, 8, 10]
    box.replica.answer()
    assert [await q.answers for q in questions] == [[[float(n)]] for n in range(1, 11)]
    assert box.done == 10 * SHORT


async def test_while_a_call_is_on_its_way_rows_gather_and_two_are_the_most(box: Box) -> None:
    box.replica.travel_s = 0.05
    box.ask(1)
    await asyncio.sleep(0.01)
    box.ask(2)
    await asyncio.sleep(0.01)
    rest = [box.ask(n) for n in range(3, 9)]
    await asyncio.sleep(0.01)
    assert len(box.replica.calls) == 2
    await asyncio.sleep(0.1)  # the second call has come, so the first is back, and a third left
    assert [sum(len(p.rows) for p in call) for call in box.replica.calls[:3]] == [1, 1, 6]
    box.replica.answer()
    assert [await q.answers for q in rest] == [[[float(n)]] for n in range(3, 9)]


async def test_a_row_that_takes_long_holds_back_nobody(box: Box) -> None:
    cold, warm = box.ask(1, version="c" * 8), box.ask(2)
    await settle()
    box.replica.answer(2)
    assert await asyncio.wait_for(warm.answers, 1) == [[2.0]]
    later = box.ask(3)
    await settle()
    box.replica.answer(3)
    assert await asyncio.wait_for(later.answers, 1) == [[3.0]]
    assert not cold.over
    box.replica.answer()  # and is fetched though nobody else asks any more
    assert await asyncio.wait_for(cold.answers, 1) == [[1.0]]


async def test_rows_of_a_gone_caller_are_dropped_by_id(box: Box) -> None:
    gone, stays = box.ask(1, 2), box.ask(3)
    await settle()
    gone.answers.cancel()
    await settle()
    assert len(box.replica.gone) == 2
    assert [ids for ids in box.replica.rows.values()] == [[3]]
    box.replica.answer()
    assert await stays.answers == [[3.0]]
    assert box.done == 3 * SHORT


async def test_word_of_gone_rows_is_sent_again_where_its_call_was_lost(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_PAUSE_S", 0.0)
    gone, stays = box.ask(1, 2), box.ask(3)
    await settle()
    real, box.replica.travel_s = box.replica.exchange, 0.01

    async def lost(parcels: Sequence[Parcel], gone: Sequence[int]) -> Reply:
        raise CallLost("the connection broke")

    monkeypatch.setattr(box.outbox, "_exchange", lost)
    gone.answers.cancel()
    await settle()
    assert not box.replica.gone
    monkeypatch.setattr(box.outbox, "_exchange", real)
    await asyncio.sleep(0.05)
    assert len(gone.sent) == 2
    assert {*gone.sent} <= {*box.replica.gone}
    stays.answers.cancel()


async def test_rows_whose_caller_goes_before_they_leave_never_leave(box: Box) -> None:
    box.ask(1, 2).answers.cancel()
    stays = box.ask(3)
    await settle()
    assert [ids for ids in box.replica.rows.values()] == [[3]]
    assert box.done == 2 * SHORT
    box.replica.answer()
    await stays.answers


async def test_an_answer_that_comes_twice_or_for_nobody_is_dropped(box: Box) -> None:
    question, other = box.ask(1), box.ask(2)
    await settle()
    ((number, _), _) = box.replica.rows.items()
    box.replica.repeat((number, [1.0]), (number, [9.0]), (10**6, [9.0]))
    box.replica.rows.pop(number)
    box.replica.wake()
    assert await asyncio.wait_for(question.answers, 1) == [[1.0]]
    assert box.done == 1 * SHORT
    box.replica.answer()
    assert await other.answers == [[2.0]]


async def test_a_lost_replica_gives_all_its_rows_back_once(box: Box) -> None:
    box.ask(1, 2)
    await settle()
    box.ask(3)
    await settle()
    box.replica.lose()
    await settle()
    assert sorted(row.question.inputs[row.at][0][0] for row, _ in box.back) == [1, 2, 3]
    assert all(isinstance(error, ReplicaLost) for _, error in box.back)
    assert box.done == 3 * SHORT
    assert box.outbox.closed


async def test_what_a_replica_cannot_answer_comes_back_with_why(box: Box) -> None:
    box.ask(1)
    await settle()
    box.replica.fail(BatchLoopDied("over"))
    await settle()
    ((_, error),) = box.back
    assert isinstance(error, BatchLoopDied)
    assert not box.outbox.closed


async def test_calls_are_made_in_no_request_s_context(box: Box) -> None:
    # Serve tells calls apart by what their context says of the request, and ends them with it.
    seen: list[str] = []
    exchange = box.replica.exchange

    async def looking(parcels: Sequence[Parcel], gone: Sequence[int]) -> Reply:
        seen.append(OF_REQUEST.get())
        return await exchange(parcels, gone)

    box.outbox._exchange = looking
    OF_REQUEST.set("a request")
    question = box.ask(1)
    await settle()
    box.replica.answer()
    await question.answers
    assert set(seen) == {""}


async def test_a_call_that_breaks_fails_its_rows_and_hangs_nobody(
    box: Box, caplog: pytest.LogCaptureFixture
) -> None:
    question = box.ask(1)
    await settle()
    box.replica.error = TypeError("a bug")
    box.replica.wake()
    with pytest.raises(TypeError):
        await asyncio.wait_for(question.answers, 1)
    assert "a bug" in caplog.text


async def test_no_call_is_larger_than_a_message(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_MAX_CALL_TOKENS", 12)
    question = box.ask(*range(1, 11), length=5)
    other = box.ask(99, length=20)  # alone it goes, however long it is
    for _ in range(40):
        await settle()
        box.replica.answer()
    assert await asyncio.wait_for(question.answers, 1) == [[float(n)] for n in range(1, 11)]
    assert await asyncio.wait_for(other.answers, 1) == [[99.0]]
    tokens = [sum(len(ids) for p in call for _, ids, *_ in p.rows) for call in box.replica.calls]
    assert max(t for t in tokens if t != 20) == 10
