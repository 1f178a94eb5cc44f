"""When those who are refused are told to come again."""

from collections import Counter

from deployments.retry import Line


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def flood(line: Line, clock: Clock, seconds: int, *, leave: int, refused: int) -> list[float]:
    """When everybody who is refused would come again, so many a second."""
    due_s = []
    for _ in range(seconds * refused):
        clock.now_s += 1 / refused
        line.left(1)  # as many as are refused; the others below
        due_s.append(clock.now_s + line.turn(1))
    line.left(seconds * (leave - refused))
    return due_s


def test_at_first_everybody_comes_in_a_second() -> None:
    line = Line(Clock())
    assert [line.turn(1) for _ in range(1000)] == [1] * 1000


def test_half_as_many_come_again_as_leave() -> None:
    clock = Clock()
    due_s = flood(Line(clock), clock, 15, leave=100, refused=100)
    come = Counter(int(due - 100) for due in due_s)
    # Each later than those before; from the third second on, 50 a second of the 100 refused.
    assert all(40 <= come[second] <= 75 for second in range(4, 30)), come
    assert sum(come[second] for second in range(4, 30)) > 0.8 * len(due_s)


def test_a_large_request_takes_the_turns_of_many() -> None:
    turns = []
    for rows in (1, 20):
        clock = Clock()
        line = Line(clock)
        line.turn(1)
        clock.now_s += 10
        line.left(100)
        turns.append([line.turn(rows) for _ in range(4)])
    assert turns[0] == [1, 1, 1, 1]
    assert turns[1] in ([1, 1, 1, 2], [1, 1, 1, 3])


def test_nobody_is_told_more_than_a_minute_nor_than_twice_as_long_as_it_has_lasted() -> None:
    clock = Clock()
    line = Line(clock)
    for seconds, most in ((3, 6), (7, 20), (90, 59)):  # in which a cold adapter is loaded
        clock.now_s += seconds
        assert max(line.turn(1) for _ in range(1000)) in (most, most + 1)


def test_what_was_given_away_passes() -> None:
    clock = Clock()
    line = Line(clock)
    flood(line, clock, 10, leave=100, refused=100)
    clock.now_s += 30
    line.left(3000)
    assert line.turn(1) == 1
