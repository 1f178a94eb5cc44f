"""How many rows come in, of one task and of many."""

import random
from collections import Counter
from functools import partial

import pytest

from deployments.errors import Overloaded
from deployments.retry import Line
from deployments.room import Room


class Clock:
    now_s = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("deployments.room.Line", partial(Line, lambda: clock.now_s))
    return clock


def fill(room: Room, task: str, at_a_time: int = 1) -> int:
    """Take as much as there is; returns how much that was."""
    num_rows = 0
    while True:
        try:
            room.take(task, at_a_time)
        except Overloaded:
            return num_rows
        num_rows += at_a_time


def test_a_task_that_is_alone_has_half_of_the_room() -> None:
    room = Room(100)
    assert fill(room, "a") == 50
    with pytest.raises(Overloaded, match="too many texts for 'a'"):
        room.take("a", 1)
    room.give_back("a", 1)
    room.take("a", 1)


def test_another_task_always_finds_room_and_tasks_end_with_equal_shares() -> None:
    room = Room(1200)
    taken: Counter[str] = Counter()
    dice = random.Random(0)
    for num_tasks in (1, 2, 3):
        for _ in range(20_000):
            task = f"t{dice.randrange(num_tasks)}"
            try:
                room.take(task, 1)
                taken[task] += 1
            except Overloaded:
                if taken[task] and dice.random() < 0.3:  # one of them is answered meanwhile
                    room.give_back(task, 1)
                    taken[task] -= 1
        share = 1200 / (num_tasks + 1)
        assert all(abs(taken[f"t{n}"] - share) < 0.1 * share for n in range(num_tasks))
        assert fill(Room(1200), f"new-{num_tasks}") > 0


def test_a_large_request_comes_in_whole_or_not_at_all() -> None:
    room = Room(100)
    room.take("a", 40)
    with pytest.raises(Overloaded):
        room.take("a", 11)
    room.take("a", 10)
    with pytest.raises(Overloaded):
        room.take("b", 26)
    room.take("b", 25)


def wait_s(room: Room, task: str) -> int:
    with pytest.raises(Overloaded, match=r"try again in \d+ s$") as refused:
        room.check(task, 1)
    return refused.value.retry_after_s


def test_who_is_refused_is_told_a_time_of_his_own(clock: Clock) -> None:
    room = Room(100)
    fill(room, "a")
    clock.now_s += 10
    assert wait_s(room, "a") in (10, 11)
    assert {wait_s(room, "a") for _ in range(3)} <= {20, 21}  # none has left
    for _ in range(10):
        room.give_back("a", 1)
        room.take("a", 1)
    assert wait_s(room, "a") == 1
    room.check("b", 1)
    assert fill(room, "b") == 25  # a check takes nothing
    clock.now_s += 1
    assert max(wait_s(room, "b") for _ in range(9)) <= 3  # whatever others are told


def test_once_a_task_has_none_on_their_way_its_line_is_over(clock: Clock) -> None:
    room = Room(100)
    fill(room, "a")
    clock.now_s += 10
    assert wait_s(room, "a") >= 10
    room.give_back("a", 50)
    fill(room, "a")
    assert wait_s(room, "a") == 1


def test_of_names_that_nobody_knows_not_all_are_remembered() -> None:
    room = Room(100)
    for task in ("a", "b", "c", "d", "e", "f", "g"):
        fill(room, task)
    for n in range(3000):
        with pytest.raises(Overloaded):
            room.check(f"nobody-{n}", 4)
    assert len(room._lines) <= 1024


def test_what_has_gone_leaves_nothing_behind() -> None:
    room = Room(100)
    for n in range(1000):
        room.take(f"t{n}", 7)
        room.give_back(f"t{n}", 7)
    assert room._taken == {}
    assert fill(room, "a") == 50
