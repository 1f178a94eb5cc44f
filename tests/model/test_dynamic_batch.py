import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from adapters.rules import Priority
from deployments.model.dynamic_batch import batch_queue, dynamic_batch
from deployments.model.planner import Planner


@dataclass(frozen=True)
class Line:
    text: str
    adapter: str = "a"
    share: str = "a"
    request: int = 0
    priority: Priority = "normal"
    deadline_s: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.text)


def spelled(line: Line) -> str:
    return f"{line.adapter} says {line.text}"


class Speller:
    """Its answers spell what they answer; it keeps every batch, and runs only while `open`."""

    def __init__(self, max_rows: int = 64) -> None:
        self.planner: Any = Planner(max_rows=max_rows, max_tokens=10**6)
        self.batches: list[list[Line]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.work: Callable[[list[Line]], list[Any]] = lambda lines: [spelled(x) for x in lines]

    @dynamic_batch
    async def answer(self, lines: list[Line]) -> list[Any]:
        self.batches.append(lines)
        await self.open.wait()
        return self.work(lines)

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]

    def send(self, *lines: Line) -> "list[asyncio.Task[Any]]":
        return [asyncio.ensure_future(self.answer(line)) for line in lines]

    async def occupied(self) -> "asyncio.Task[Any]":
        """Start a forward that runs until `open` is set."""
        self.open.clear()
        (first,) = self.send(Line("first"))
        await settle()
        assert self.sizes == [1]
        return first


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest_asyncio.fixture
async def speller() -> AsyncIterator[Speller]:
    speller = Speller()
    yield speller
    queue = batch_queue(speller.answer)
    if queue is not None:
        queue.close()


async def test_the_next_batch_is_all_that_queued_during_the_forward(speller: Speller) -> None:
    calls = [await speller.occupied()]
    for index in range(59):
        calls += speller.send(Line(f"row {index}"))
        await asyncio.sleep(0)
    queue = batch_queue(speller.answer)
    await settle()
    assert queue is not None
    assert len(queue) == 59
    speller.open.set()
    await asyncio.gather(*calls)
    assert speller.sizes == [1, 59]


async def test_sixty_rows_one_a_millisecond_take_about_three_forwards_of_50_ms() -> None:
    class Slow:
        planner = Planner(max_rows=64, max_tokens=10**6)

        def __init__(self) -> None:
            self.sizes: list[int] = []

        @dynamic_batch
        async def answer(self, lines: list[Line]) -> list[Any]:
            self.sizes.append(len(lines))
            await asyncio.sleep(0.05)
            return [spelled(line) for line in lines]

    slow, calls = Slow(), []
    for index in range(60):
        calls.append(asyncio.ensure_future(slow.answer(Line(f"row {index}"))))
        await asyncio.sleep(0.001)
    await asyncio.gather(*calls)
    # Rows that come slower than one a millisecond, on a busy machine, take a forward or two more.
    assert 2 <= len(slow.sizes) <= 5, slow.sizes
    assert sum(slow.sizes) == 60


async def test_a_lone_row_does_not_wait_for_company(speller: Speller) -> None:
    started_s = time.perf_counter()
    assert await speller.answer(Line("alone")) == "a says alone"
    assert time.perf_counter() - started_s < 0.05
    calls = speller.send(Line("again"))
    await settle()  # no timer: a few turns of the event loop are enough
    assert calls[0].done()


async def test_a_stream_of_better_fitting_lengths_never_holds_a_row_up() -> None:
    speller = Speller(max_rows=4)
    short = Line("x" * 10)
    calls = [await speller.occupied(), *speller.send(*[short] * 6)]
    calls += speller.send(Line("y" * 500))
    await settle()

    def flood(lines: list[Line]) -> list[Any]:
        # Twice as many of the well-fitting rows come as a forward takes away.
        if len(speller.batches) < 30:
            calls.extend(speller.send(*[short] * 8))
        return [spelled(line) for line in lines]

    speller.work = flood
    speller.open.set()
    while len(speller.batches) < 30:
        await asyncio.sleep(0)
    turns = [
        i for i, batch in enumerate(speller.batches) if any(x.num_tokens == 500 for x in batch)
    ]
    assert len(turns) == 1
    assert turns[0] <= 1 + 6  # each forward takes the oldest, so the six before it at the most
    await asyncio.gather(*calls)


async def test_a_row_whose_caller_left_is_dropped_before_the_forward(speller: Speller) -> None:
    first = await speller.occupied()
    stays, leaves = speller.send(Line("stays"), Line("leaves"))
    await settle()
    leaves.cancel()
    speller.open.set()
    assert await asyncio.gather(first, stays) == ["a says first", "a says stays"]
    assert speller.batches == [[Line("first")], [Line("stays")]]


async def test_a_queue_of_only_cancelled_rows_runs_no_forward(speller: Speller) -> None:
    first = await speller.occupied()
    gone = speller.send(Line("x"), Line("y"))
    await settle()
    for call in gone:
        call.cancel()
    speller.open.set()
    await first
    await settle()
    assert speller.sizes == [1]
    assert await speller.answer(Line("later")) == "a says later"


async def test_a_caller_that_leaves_during_its_forward_harms_nobody(speller: Speller) -> None:
    first = await speller.occupied()
    neighbours = speller.send(Line("x"), Line("y"))
    await settle()
    first.cancel()
    speller.open.set()
    assert await asyncio.gather(*neighbours) == ["a says x", "a says y"]
    assert await speller.answer(Line("later")) == "a says later"


async def test_an_exception_in_a_rows_place_fails_that_row_alone(speller: Speller) -> None:
    speller.work = lambda lines: [
        ValueError("bad is bad") if line.text == "bad" else spelled(line) for line in lines
    ]
    first = await speller.occupied()
    good, bad, fine = speller.send(Line("good"), Line("bad"), Line("fine"))
    await settle()
    speller.open.set()
    assert await asyncio.gather(first, good, fine) == ["a says first", "a says good", "a says fine"]
    with pytest.raises(ValueError, match="bad is bad"):
        await bad
    assert speller.sizes == [1, 3]


@pytest.mark.parametrize("place", range(7))
async def test_a_row_that_fails_the_whole_forward_still_fails_alone(
    speller: Speller, place: int
) -> None:
    def work(lines: list[Line]) -> list[Any]:
        if any(line.text == "bomb" for line in lines):
            raise RuntimeError("the forward burst")
        return [spelled(line) for line in lines]

    speller.work = work
    first = await speller.occupied()
    lines = [Line("bomb" if index == place else f"row {index}") for index in range(7)]
    calls = speller.send(*lines)
    await settle()
    speller.open.set()
    await first
    for line, call in zip(lines, calls, strict=True):
        if line.text == "bomb":
            with pytest.raises(RuntimeError, match="the forward burst"):
                await call
        else:
            assert await call == spelled(line)
    assert len(speller.batches) <= 1 + 2 * 3 + 1  # halving, not one by one


@pytest.mark.parametrize("change", [lambda a: a[:-1], lambda a: [*a, "one more"], lambda a: []])
async def test_a_wrong_number_of_answers_answers_nobody(
    speller: Speller, change: Callable[[list[Any]], list[Any]]
) -> None:
    speller.work = lambda lines: change([spelled(line) for line in lines])
    calls = [await speller.occupied(), *speller.send(Line("x"), Line("y"))]
    await settle()
    speller.open.set()
    for answer in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(answer, RuntimeError)
        assert "answers" in str(answer)
    speller.work = lambda lines: [spelled(line) for line in lines]
    assert await speller.answer(Line("later")) == "a says later"


async def test_a_planner_that_admits_nothing_still_runs_every_row(speller: Speller) -> None:
    speller.planner = Planner(max_rows=0, max_tokens=0)
    assert await asyncio.gather(*speller.send(Line("x"), Line("y"))) == ["a says x", "a says y"]
    assert speller.sizes == [1, 1]


async def test_every_instance_has_its_own_queue(speller: Speller) -> None:
    other = Speller()
    assert batch_queue(other.answer) is None
    first = await speller.occupied()
    assert await other.answer(Line("x", "b")) == "b says x"  # does not wait for the first one's
    assert batch_queue(speller.answer) is not batch_queue(other.answer)
    queue = batch_queue(other.answer)
    assert queue is not None
    queue.close()
    await settle()
    speller.open.set()
    assert await first == "a says first"
    assert other.batches == [[Line("x", "b")]]


@pytest.mark.parametrize("seed", range(3))
async def test_rows_never_cross(seed: int) -> None:
    chance = random.Random(seed)
    speller = Speller(max_rows=chance.choice([3, 16, 64]))

    def work(lines: list[Line]) -> list[Any]:
        if chance.random() < 0.02:
            raise RuntimeError("burst")
        return [
            ValueError(spelled(line)) if line.text.endswith("!") else spelled(line)
            for line in lines
        ]

    speller.work = work
    lines = [
        Line(f"{n}" + "x" * chance.randrange(80) + chance.choice(["", "", "", "!"]), f"adapter{a}")
        for n, a in enumerate(chance.choices(range(40), k=2000))
    ]
    calls, left = [], set()
    for line in lines:
        (call,) = speller.send(line)
        calls.append(call)
        if chance.random() < 0.1:
            left.add(line)
            asyncio.get_running_loop().call_soon(call.cancel)
        if chance.random() < 0.2:
            await asyncio.sleep(0)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    num_answered = 0
    for line, answer in zip(lines, answers, strict=True):
        if isinstance(answer, asyncio.CancelledError):
            assert line in left
        elif line.text.endswith("!"):
            assert isinstance(answer, (ValueError, RuntimeError))
            assert str(answer) in (spelled(line), "burst")
        elif not (isinstance(answer, RuntimeError) and str(answer) == "burst"):
            assert answer == spelled(line)
            num_answered += 1
    assert num_answered > 1000
    assert max(speller.sizes) > 1
