"""How many rows come in, of one task and of many."""

import random
from collections import Counter

import pytest

from deployments.errors import Overloaded
from deployments.room import Room


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


def test_who_is_refused_is_told_a_time_of_his_own() -> None:
    room = Room(100)
    fill(room, "a")
    told = set()
    for _ in range(3):
        with pytest.raises(Overloaded) as refused:
            room.take("a", 1)
        told.add(refused.value.retry_after_s)
    assert told == {1}  # how fast rows leave is not known yet
    assert str(refused.value).endswith("try again in 1 s")
    room.check("b", 1)
    assert fill(room, "b") == 25  # a check takes nothing


def test_what_has_gone_leaves_nothing_behind() -> None:
    room = Room(100)
    for n in range(1000):
        room.take(f"t{n}", 7)
        room.give_back(f"t{n}", 7)
    assert room._taken == {}
    assert fill(room, "a") == 50
