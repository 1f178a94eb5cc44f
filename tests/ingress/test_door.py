"""A request's rows are counted from when it comes in until it goes, however it goes."""

import asyncio
import contextlib

import pytest

from deployments.errors import BadInput, Overloaded
from deployments.ingress.door import Visit, check_timeout, to_deadline
from deployments.room import LEAST_ROWS, Room


def test_rows_are_let_out_when_a_request_ends_and_when_it_fails() -> None:
    room = Room(10)
    with Visit(room, "mood", 5, None), pytest.raises(Overloaded):
        Visit(room, "mood", 1, None)
    with pytest.raises(Overloaded), Visit(room, "mood", 5, None) as visit:
        visit.grow(6)
    with Visit(room, "mood", 5, None) as visit:
        visit.grow(3)  # some of its texts cannot be read
    with Visit(room, "mood", 5, None):
        pass


def test_a_request_counts_as_four_rows_at_least() -> None:
    room = Room(10 * LEAST_ROWS)
    with contextlib.ExitStack() as visits:
        for _ in range(5):
            visits.enter_context(Visit(room, "mood", 1, None)).grow(LEAST_ROWS)
        with pytest.raises(Overloaded):
            Visit(room, "mood", 1, None)
        visits.enter_context(Visit(room, "topic", 2 * LEAST_ROWS, None))
    room.take("mood", 5 * LEAST_ROWS)


def test_windows_count_as_rows() -> None:
    room = Room(40)
    with Visit(room, "mood", 1, None) as visit:
        visit.grow(20)
        with pytest.raises(Overloaded, match="too many texts for 'mood'"):
            visit.grow(21)
        visit.grow(20)  # of another version
        with Visit(room, "topic", 10, None):
            pass
    with Visit(room, "mood", 20, None):
        pass


async def test_a_deadline_is_a_little_before_the_caller_goes() -> None:
    now_s = asyncio.get_running_loop().time()
    assert to_deadline(None) is None
    for timeout_s, left_s in ((0.1, 0.09), (1.0, 0.9), (60.0, 59.75)):
        deadline_s = to_deadline(timeout_s)
        assert deadline_s is not None
        assert deadline_s - now_s == pytest.approx(left_s, abs=0.02)


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), "3", True, [1]])
def test_what_is_no_timeout_is_refused(wrong: object) -> None:
    with pytest.raises(BadInput, match="is no number of seconds over 0"):
        check_timeout(wrong)
    assert check_timeout(2) == 2.0
    assert check_timeout(None) is None
