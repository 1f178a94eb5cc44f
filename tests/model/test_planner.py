import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.model.planner import Planner

LENGTHS = st.lists(st.integers(1, 600), min_size=1, max_size=80)
PLANNERS = st.builds(
    Planner,
    max_rows=st.integers(1, 40),
    max_tokens=st.integers(1, 5000),
    max_stretch=st.sampled_from([1.0, 1.5, 2.0, 1e9]),
    short_tokens=st.integers(1, 40),
)


def distance(length: int, oldest: int) -> int:
    """How far a length is from the oldest row's: what is longer, twice as far."""
    return 2 * (length - oldest) if length > oldest else oldest - length


def fits(planner: Planner, lengths: list[int]) -> bool:
    """Whether rows of these lengths may go through one forward."""
    longest, shortest = max(lengths), max(min(lengths), planner.short_tokens)
    return (
        len(lengths) <= planner.max_rows
        and len(lengths) * longest <= planner.max_tokens
        and longest <= planner.max_stretch * shortest
    )


@given(PLANNERS, LENGTHS)
def test_the_oldest_row_is_always_picked(planner: Planner, lengths: list[int]) -> None:
    assert planner.pick(lengths)[0] == 0


@given(PLANNERS, LENGTHS)
def test_indices_are_unique_ascending_and_in_range(planner: Planner, lengths: list[int]) -> None:
    picked = planner.pick(lengths)
    assert picked == sorted(set(picked))
    assert picked[-1] < len(lengths)


@given(PLANNERS, LENGTHS)
def test_rows_padded_tokens_and_stretch_stay_under_their_caps(
    planner: Planner, lengths: list[int]
) -> None:
    picked = [lengths[index] for index in planner.pick(lengths)]
    if len(picked) > 1:  # a single row may be as long as it likes
        assert fits(planner, picked)


def test_without_padding_tokens_count_and_lengths_only_beyond_four_times_a_batch() -> None:
    planner = Planner(max_rows=64, max_tokens=512, padded=False)
    assert planner.pick([200, 100, 8, 200, 9]) == [0, 1, 3, 4]  # 509 tokens, with 8 more 517
    # Embeddings and heads are padded: ten rows of 200 are 2,000 tokens to them.
    assert planner.pick([200, *[4] * 40]) == [*range(10)]
    assert planner.tokens([200, 4, 4]) == 208


@given(PLANNERS, LENGTHS)
def test_nearer_lengths_go_first_and_only_what_would_not_fit_stays(
    planner: Planner, lengths: list[int]
) -> None:
    """For every row: with all nearer ones that were picked, it fits if and only if it is picked."""
    picked = set(planner.pick(lengths))

    def rank(index: int) -> tuple[int, int]:
        return distance(lengths[index], lengths[0]), index

    for index in range(1, len(lengths)):
        nearer = [other for other in picked if rank(other) < rank(index)]
        batch = [lengths[0], *(lengths[other] for other in nearer if other), lengths[index]]
        assert fits(planner, batch) == (index in picked), (index, picked)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=80), st.integers(1, 20))
def test_with_room_for_some_the_nearest_are_taken(lengths: list[int], max_rows: int) -> None:
    planner = Planner(max_rows, max_tokens=10**9, max_stretch=1e9)
    picked = planner.pick(lengths)
    assert len(picked) == min(max_rows, len(lengths))
    far = sorted(distance(length, lengths[0]) for length in lengths)
    assert sorted(distance(lengths[index], lengths[0]) for index in picked) == far[: len(picked)]


def test_a_row_over_the_token_budget_runs_alone() -> None:
    assert Planner(max_rows=8, max_tokens=100).pick([300, 300, 5, 80]) == [0]


def test_the_budget_counts_padding() -> None:
    # 3 rows of 40 are 120 tokens once padded, whatever their own lengths add up to.
    assert Planner(max_rows=8, max_tokens=119).pick([30, 40, 31]) == [0, 2]
    assert Planner(max_rows=8, max_tokens=120).pick([30, 40, 31]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("lengths", "picked"),
    [
        ([64, 33, 32, 31], [0, 1, 2]),  # 64 is more than twice 31
        ([31, 62, 63], [0, 1]),
        ([3, 32, 33], [0, 1]),  # short ones count as 16
        ([48, 25, 90], [0, 1]),  # within twice of the oldest, but not of each other
    ],
)
def test_padding_more_than_doubles_no_row(lengths: list[int], picked: list[int]) -> None:
    assert Planner(max_rows=8, max_tokens=10**9).pick(lengths) == picked


def test_equal_lengths_go_in_the_order_they_came() -> None:
    assert Planner(max_rows=3, max_tokens=10**9).pick([7, 9, 7, 9, 7, 7]) == [0, 2, 4]


def test_a_shorter_row_goes_before_one_that_is_longer_by_as_much() -> None:
    assert Planner(max_rows=2, max_tokens=10**9).pick([20, 22, 17, 21]) == [0, 3]
    assert Planner(max_rows=2, max_tokens=10**9).pick([20, 22, 17]) == [0, 2]
