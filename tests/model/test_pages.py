import random

import pytest

from deployments.model.pages import Pages


def numbers(pieces: list[range]) -> list[int]:
    return [number for piece in pieces for number in piece]


def test_pages_are_given_in_one_piece_where_there_is_one() -> None:
    pages = Pages(1, 101)
    first, second, third = (pages.take(count) for count in (30, 10, 60))
    assert [numbers(p) for p in (first, second, third)] == [
        [*range(1, 31)], [*range(31, 41)], [*range(41, 101)],
    ]  # fmt: skip
    pages.give(first)
    pages.give(second)
    assert pages.take(40) == [range(1, 41)], "what was given back is joined"


def test_the_tightest_piece_is_taken() -> None:
    pages = Pages(1, 101)
    taken = [pages.take(count) for count in (40, 5, 10, 5, 40)]
    pages.give(taken[0])
    pages.give(taken[2])
    assert pages.take(9) == [range(46, 55)]


def test_what_is_free_can_be_had_in_pieces_the_largest_first() -> None:
    pages = Pages(1, 31)
    taken = [pages.take(5) for _ in range(6)]
    for index in (0, 2, 3, 5):
        pages.give(taken[index])
    pieces = pages.take(18)
    assert sum(map(len, pieces)) == 18
    assert pieces[0] == range(11, 21)
    assert pages.num_free == 2


def test_more_than_is_free_is_refused_and_takes_nothing() -> None:
    pages = Pages(1, 11)
    with pytest.raises(MemoryError, match="11 pages are asked for, and 10 are free"):
        pages.take(11)
    assert numbers(pages.take(10)) == [*range(1, 11)]
    assert Pages(1, 1).num_free == 0
    assert Pages(1, 1).take(0) == []


@pytest.mark.parametrize("seed", range(3))
def test_no_page_is_had_twice_and_none_is_lost(seed: int) -> None:
    dice = random.Random(seed)
    pages, held = Pages(1, 501), list[list[range]]()
    for _ in range(2000):
        count = dice.randrange(60)
        if dice.random() < 0.5 and count <= pages.num_free:
            held.append(pages.take(count))
            assert len(numbers(held[-1])) == count
        elif held:
            pages.give(held.pop(dice.randrange(len(held))))
        taken = [number for pieces in held for number in numbers(pieces)]
        assert len(set(taken)) == len(taken) == 500 - pages.num_free
        assert all(1 <= number <= 500 for number in taken)
    for pieces in held:
        pages.give(pieces)
    assert pages.take(500) == [range(1, 501)]
