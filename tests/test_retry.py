"""When those who are refused are told to come again."""

from deployments.retry import RetryAfter


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def leave(retry: RetryAfter, clock: Clock, per_s: int) -> None:
    """Let rows leave for two seconds."""
    retry.begin()
    for _ in range(2 * per_s):
        clock.now_s += 1 / per_s
        retry.left(1)


def test_until_it_is_known_how_fast_rows_leave_everybody_comes_in_a_second() -> None:
    clock = Clock()
    retry = RetryAfter(clock)
    assert [retry.turn(1) for _ in range(1000)] == [1] * 1000


def test_half_as_many_come_again_as_leave() -> None:
    clock = Clock()
    retry = RetryAfter(clock)
    leave(retry, clock, per_s=100)
    turns = [retry.turn(1) for _ in range(500)]
    assert turns == sorted(turns)
    per_second = [turns.count(s) for s in range(2, 11)]
    assert all(45 <= count <= 55 for count in per_second), per_second
    large = RetryAfter(clock)
    leave(large, clock, per_s=100)
    assert [large.turn(49) for _ in range(4)] == [1, 2, 3, 4]  # the rest is rounding


def test_nobody_is_told_more_than_a_minute_and_what_was_given_away_passes() -> None:
    clock = Clock()
    retry = RetryAfter(clock)
    leave(retry, clock, per_s=10)
    assert max(retry.turn(1) for _ in range(1000)) == 60
    clock.now_s += 30
    assert 30 <= retry.turn(1) <= 31
    clock.now_s += 100
    assert retry.turn(1) == 1


def test_hours_in_which_nothing_waits_are_not_counted() -> None:
    clock = Clock()
    retry = RetryAfter(clock)
    leave(retry, clock, per_s=100)
    clock.now_s += 3600
    leave(retry, clock, per_s=100)
    assert [retry.turn(1) for _ in range(40)] == [1] + [2] * 39
