import time

import pytest

from adapters.errors import AdapterChanged, AdapterError, AdapterIncomplete, AdapterRefused
from adapters.failures import _REMEMBERED, Failures


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Work:
    """Fails while it has an error, and counts how often it was really tried."""

    def __init__(self) -> None:
        self.error: Exception | None = AdapterRefused("mood", ["no head", "no rank"])
        self.num_tries = 0

    def __call__(self, failures: Failures, mark: object = "look", name: str = "mood") -> str:
        with failures.remembering(name, mark):
            self.num_tries += 1
            if self.error is not None:
                raise self.error
            return "done"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def failures(clock: Clock) -> Failures:
    return Failures(first_s=1, longest_s=5, clock=clock)


def test_a_failure_is_told_again_without_another_try(failures: Failures) -> None:
    work = Work()
    for _ in range(5):
        with pytest.raises(AdapterRefused) as caught:
            work(failures)
        assert caught.value.problems == ("no head", "no rank")
    assert work.num_tries == 1


def test_what_changed_is_tried_at_once(failures: Failures) -> None:
    work = Work()
    for mark in ("first", "second", "second"):
        with pytest.raises(AdapterRefused):
            work(failures, mark)
    assert work.num_tries == 2
    work.error = None
    assert work(failures, "third") == "done"


def test_each_failure_in_a_row_holds_twice_as_long(failures: Failures, clock: Clock) -> None:
    work = Work()
    for waits_s in (1, 2, 4, 5, 5):
        with pytest.raises(AdapterRefused):
            work(failures)
        tries = work.num_tries
        clock.now_s += waits_s - 0.01
        with pytest.raises(AdapterRefused):
            work(failures)
        assert work.num_tries == tries
        clock.now_s += 0.02
    work.error = None
    assert work(failures) == "done"
    work.error = ValueError("anew")
    with pytest.raises(ValueError, match="anew"):
        work(failures)
    clock.now_s += 1.01  # a row of failures ends with a success
    tries = work.num_tries
    with pytest.raises(ValueError, match="anew"):
        work(failures)
    assert work.num_tries == tries + 1


def test_one_failure_is_not_another_s(failures: Failures) -> None:
    work, other = Work(), Work()
    other.error = None
    with pytest.raises(AdapterRefused):
        work(failures)
    assert other(failures, name="spam") == "done"


def test_an_error_does_not_grow_with_every_telling(failures: Failures) -> None:
    work, depths = Work(), []
    for _ in range(50):
        with pytest.raises(AdapterRefused) as caught:
            work(failures)
        depths.append(len(caught.traceback))
    assert max(depths) < 10


@pytest.mark.parametrize(
    "error",
    [
        AdapterIncomplete("mood", "it is on its way"),
        AdapterChanged("mood", "1" * 8, "2" * 8),
        OSError(5, "Input/output error", "weights"),
        RuntimeError("no memory"),
    ],
)
def test_an_error_is_told_as_it_was(failures: Failures, error: Exception) -> None:
    work, told = Work(), []
    work.error = error
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            work(failures)
        told.append(caught.value)
    assert str(told[0]) == str(told[1])
    assert vars(told[0]) == vars(told[1])
    assert told[0] is not told[1]


def test_what_is_no_failure_is_not_remembered(failures: Failures) -> None:
    with pytest.raises(KeyboardInterrupt), failures.remembering("mood", 1):
        raise KeyboardInterrupt
    with failures.remembering("mood", 1):
        pass


def test_the_oldest_of_very_many_is_forgotten() -> None:
    failures, work = Failures(clock=time.monotonic), Work()
    for index in range(_REMEMBERED + 1):
        with pytest.raises(AdapterError):
            work(failures, name=f"task-{index}")
    assert len(failures._failures) == _REMEMBERED
    with pytest.raises(AdapterError):
        work(failures, name="task-0")
    assert work.num_tries == _REMEMBERED + 2


def test_what_holds_is_told_with_the_seconds_left_until_it_is_forgotten(
    failures: Failures, clock: Clock
) -> None:
    work = Work()
    for name in ("mood", "spam"):
        with pytest.raises(AdapterRefused):
            work(failures, name=name)
        clock.now_s += 0.75
    [(name, error, left_s)] = failures.holding()  # the other's time is over
    assert (name, str(error), left_s) == ("spam", str(work.error), pytest.approx(0.25))
    failures.forget("spam")
    failures.forget("nowhere")
    assert list(failures.holding()) == []
    with pytest.raises(AdapterRefused):
        work(failures, name="spam")
    assert work.num_tries == 3
