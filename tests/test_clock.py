"""A profile charges every moment once, and to the stage that it belongs to."""

from collections import Counter

import pytest

from benchmarks.clock import Clock, watched
from benchmarks.examples import example_engine, example_rows, example_tokenizer
from benchmarks.stages import CLOSE, Forwards, Times, add_up
from benchmarks.timing import timed


def test_time_inside_a_stage_is_charged_to_the_one_entered_last() -> None:
    hands = 0.0
    clock = Clock(lambda: hands)

    def pass_s(seconds: float) -> None:
        nonlocal hands
        hands += seconds

    def outer() -> None:
        pass_s(1)
        inner()
        pass_s(2)
        inner()

    inner = clock.within("inner", lambda: pass_s(10))
    pass_s(100)  # outside of all stages
    clock.within("outer", outer)()
    assert clock.seconds == {"outer": 3, "inner": 20}


def test_a_stage_ends_when_its_work_fails() -> None:
    hands = iter(range(100))
    clock = Clock(lambda: float(next(hands)))

    def failing() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        clock.within("failing", failing)()
    clock.within("next", lambda: None)()
    assert clock.seconds == {"failing": 1, "next": 1}


def test_a_watched_forward_is_charged_whole_and_answers_the_same() -> None:
    engine, clock = example_engine("none"), Clock()
    rows = example_rows(example_tokenizer(engine))[:32]
    want = engine.predict(rows)
    with watched(engine, clock):
        got: list[object] = []
        seconds = timed(lambda: got.extend(engine.predict(rows)))
    assert got == want
    assert set(clock.seconds) == {"pack", "base", "LoRA", "head", "post"}
    assert all(spent > 0 for spent in clock.seconds.values())
    assert sum(clock.seconds.values()) == pytest.approx(seconds, rel=CLOSE)
    assert clock.seconds["base"] == max(clock.seconds.values())
    charged = clock.seconds.copy()
    engine.predict(rows)
    assert clock.seconds == charged, "it is watched no more"


def test_requests_wait_from_when_they_are_made_until_their_forward_begins() -> None:
    """Two requests at 0 s and 1 s, tokenised in 0.5 s each, one forward of both from 3 s to 5 s."""
    forwards = Forwards(
        of_rows=Counter(base=2 * 1.5, LoRA=2 * 0.5),
        busy=Counter(base=1.5, LoRA=0.5),
        spans=[(103.0, 105.0, 2)],
    )
    times = Times(began=0 + 1, ended=5.5 + 6, total_s=5.5 + 5, run_s=6)
    found = add_up(times, forwards, tokenised_s=2 * 0.5, began_s=100.0)
    assert found.of_requests == {
        "tokenise": 1,
        "queue": 2.5 + 1.5,
        "pack": 0,
        "base": 3,
        "LoRA": 1,
        "head": 0,
        "post": 0.5 + 1,
    }
    assert sum(found.of_requests.values()) == found.total_s
    assert found.of_device["queue"] == 3 + 1
    assert sum(found.of_device.values()) == found.run_s
