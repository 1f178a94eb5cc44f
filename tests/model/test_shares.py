"""Fair shares of the queue, on rows that take as long as they have tokens."""

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from adapters.rules import Priority
from deployments.model.planner import Filling, Planner
from deployments.model.shares import Shares
from deployments.model.waiter import Waiter

PLANNER = Planner(max_rows=16, max_tokens=512, max_stretch=1.25, short_tokens=8)
PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")
NUMBERS = count()
RAGGED = Planner(max_rows=64, max_tokens=512, padded=False)
either = pytest.mark.parametrize("planner", [PLANNER, RAGGED], ids=["padded", "ragged"])
MOST_ROWS = 4096  # that a replica lets in


@dataclass(frozen=True)
class Item:
    num_tokens: int = 20
    share: str = "bulk"
    request: int = 0
    priority: Priority = "normal"
    deadline_s: float | None = None


ITEMS = st.builds(
    Item,
    num_tokens=st.integers(4, 200),
    share=st.sampled_from("abc"),
    request=st.integers(0, 4),
    priority=st.sampled_from(PRIORITIES),
)
EQUALS = st.builds(
    Item,
    num_tokens=st.integers(4, 200),
    share=st.sampled_from("abc"),
    request=st.integers(0, 4),
)


def wait(shares: Shares, *items: Item) -> list[Waiter]:
    waiters = [Waiter(item) for item in items]
    for waiter in waiters:
        shares.add(waiter)
    return waiters


def take(shares: Shares, planner: Planner = PLANNER) -> list[Item]:
    taken: list[Waiter] = []
    shares.take(planner, taken)
    return [waiter.row for waiter in taken]


def singles(share: str, num: int, tokens: int = 20, priority: Priority = "normal") -> list[Item]:
    return [Item(tokens, share, next(NUMBERS), priority) for _ in range(num)]


def fits(items: Sequence[Item], planner: Planner) -> bool:
    lengths = [item.num_tokens for item in items]
    if len(items) == 1:
        return True
    if len(items) > planner.max_rows:
        return False
    if not planner.padded:  # embeddings and heads are, of a batch four times as large at most
        padded = len(lengths) * max(lengths)
        return sum(lengths) <= planner.max_tokens and padded <= 4 * planner.max_tokens
    shortest = max(min(lengths), planner.short_tokens)
    may_share = max(lengths) <= planner.max_stretch * shortest
    return may_share and len(items) * max(lengths) <= planner.max_tokens


def test_a_flood_leaves_batches_short_for_others_and_for_a_while_for_their_next_rows() -> None:
    most, shares = RAGGED.max_tokens, Shares(padded=False)
    wait(shares, *singles("flood", 2000))

    def tokens_of_a_batch() -> int:
        return sum(item.num_tokens for item in take(shares, RAGGED))

    turn = most / 8 + 64 + 20  # what a turn may be over
    assert tokens_of_a_batch() > most - 20
    wait(shares, *singles("lone", 1))
    assert most / 8 <= tokens_of_a_batch() - 20 <= most / 8 + turn
    before = [tokens_of_a_batch() for _ in range(16)]
    assert all(most / 2 <= part <= most / 2 + turn for part in before)
    assert tokens_of_a_batch() > most - 20


def test_nobody_has_short_batches_for_who_has_gone_or_is_less_urgent() -> None:
    most, shares = RAGGED.max_tokens, Shares(padded=False)
    wait(shares, *singles("bulk", 10))
    take(shares, RAGGED)
    wait(shares, *singles("bulk", 500))
    assert sum(item.num_tokens for item in take(shares, RAGGED)) > most - 20
    shares = Shares(padded=False)
    wait(shares, *singles("urgent", 2000, priority="high"))
    for _ in range(5):
        wait(shares, *singles("lone", 1, priority="low"))
        assert sum(item.num_tokens for item in take(shares, RAGGED)) > most - 20


def test_tasks_that_a_batch_can_end_fill_all_of_it() -> None:
    shares, num_rows = Shares(padded=False), RAGGED.max_tokens // 20
    wait(shares, *singles("a", 1), *singles("b", num_rows // 2), *singles("c", num_rows // 2 - 2))
    assert {item.share for item in take(shares, RAGGED)} == {*"abc"}
    assert not shares


@given(st.lists(ITEMS, min_size=1, max_size=120), st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_row_goes_once_in_batches_that_fit(
    items: list[Item], dice: random.Random, padded: bool
) -> None:
    planner = PLANNER if padded else RAGGED
    shares, waiters, gone, came = Shares(padded=padded), [], [], []
    for item in items:
        waiters += wait(shares, item)
        if dice.random() < 0.2:
            dropped = dice.choice(waiters)
            if not dropped.gone:
                gone.append(dropped)
            shares.discard(dropped)
        if shares and dice.random() < 0.1:
            batch: list[Waiter] = []
            shares.take(planner, batch)
            assert fits([waiter.row for waiter in batch], planner)
            came += batch
        left = [waiter.row for waiter in waiters if not waiter.gone]
        assert len(shares) == len(left)
        assert shares.num_tokens == sum(item.num_tokens for item in left)
    while shares:
        shares.take(planner, came)
    assert sorted(map(id, came + gone)) == sorted(map(id, waiters))


@given(st.lists(EQUALS, max_size=60), st.lists(EQUALS, min_size=1, max_size=12), EQUALS)
@settings(max_examples=20, deadline=None, phases=(Phase.generate,))
@either
def test_no_row_waits_for_ever(
    planner: Planner, before: list[Item], flood: list[Item], item: Item
) -> None:
    """Whatever comes with every batch, twice as much as one takes while there is room for it."""
    shares = Shares(padded=planner.padded)
    wait(shares, *before)
    (waiter,) = wait(shares, item)
    num_batches = 0
    while not waiter.gone:
        take(shares, planner)
        num_batches += 1
        for _ in range(2 * planner.max_rows // len(flood) + 1 if len(shares) < MOST_ROWS else 0):
            wait(shares, *(Item(i.num_tokens, i.share, next(NUMBERS), i.priority) for i in flood))
        assert num_batches < MOST_ROWS
    assert waiter.gone


@pytest.mark.parametrize("tokens", [3, 20, 200])
@pytest.mark.parametrize("flood", [singles("bulk", 5000), [Item()] * 5000])
@either
def test_a_lone_row_of_another_task_leads_the_next_batch(
    flood: list[Item], tokens: int, planner: Planner
) -> None:
    shares = Shares(padded=planner.padded)
    wait(shares, *flood)
    for _ in range(20):
        take(shares, planner)
        (item,) = singles("mine", 1, tokens)
        wait(shares, item)
        assert take(shares, planner)[0] is item


@either
def test_a_single_text_does_not_wait_for_a_request_of_1024_windows_of_its_own_task(
    planner: Planner,
) -> None:
    shares = Shares(padded=planner.padded)
    wait(shares, *[Item(128, "long", next(NUMBERS))] * 1024)
    take(shares, planner)
    for _ in range(20):
        items = singles("long", 3, 128)
        wait(shares, *items)
        batches = [*take(shares, planner), *take(shares, planner)]
        assert all(item in batches for item in items)


@either
def test_shares_converge_though_one_has_a_hundred_times_as_many_rows(planner: Planner) -> None:
    shares, had, dice = Shares(padded=planner.padded), Counter[str](), random.Random(0)
    lengths = list(range(5, 60))
    wait(shares, *(i for n in lengths for i in singles("many", 200, n)))
    for _ in range(400):
        wait(
            shares,
            *(i for _ in range(20) for i in singles("few", 1, dice.choice(lengths))),
        )
        wait(shares, *(i for _ in range(10) for i in singles("third", 1, dice.choice(lengths))))
        for item in take(shares, planner):
            had[item.share] += item.num_tokens
    whole = sum(had.values())
    for share in ("many", "few", "third"):
        assert had[share] / whole == pytest.approx(1 / 3, abs=0.05), had


@either
def test_a_task_that_was_away_has_no_claim_to_what_it_did_not_ask_for(planner: Planner) -> None:
    shares = Shares(padded=planner.padded)
    wait(shares, *singles("busy", 1000), *singles("late", 1))
    for _ in range(30):
        take(shares, planner)
    wait(shares, *singles("late", 1000))
    had = Counter(item.share for _ in range(10) for item in take(shares, planner))
    assert had["busy"] == pytest.approx(had["late"], rel=0.2)


@pytest.mark.parametrize("priority", ["high", "normal"])
@either
def test_a_row_of_a_higher_priority_leads_the_next_batch(
    priority: Priority, planner: Planner
) -> None:
    shares = Shares(padded=planner.padded)
    wait(shares, *singles("bulk", 4000, priority="low"))
    for task in range(50):  # all of them come anew, and still go after it
        wait(shares, *singles(f"other{task}", 20, priority="low"))
    for _ in range(30):
        (item,) = singles("urgent", 1, 150, priority)
        wait(shares, item)
        assert take(shares, planner)[0] is item
        take(shares, planner)


@either
def test_a_flood_of_high_priority_leaves_the_others_their_share(planner: Planner) -> None:
    shares, had = Shares(padded=planner.padded), Counter[str]()
    for priority in PRIORITIES:
        wait(shares, *singles(f"of {priority}", 20_000, 20, priority))
    for _ in range(600):
        had.update(item.priority for item in take(shares, planner))
    whole = sum(had.values())
    for priority, weight in zip(PRIORITIES, (16, 4, 1), strict=True):
        assert had[priority] / whole == pytest.approx(weight / 21, rel=0.3), had


def test_a_choice_among_a_hundred_thousand_rows_is_a_matter_of_a_millisecond() -> None:
    shares, dice = Shares(), random.Random(0)
    for index in range(100_000):
        wait(shares, Item(dice.randrange(5, 128), f"task{index % 50}", index))
    taken_s = []
    for _ in range(100):
        started_s = time.perf_counter()
        take(shares)
        taken_s.append(time.perf_counter() - started_s)
    assert sorted(taken_s)[50] < 0.02  # 0.4 ms where nobody else computes
    assert len(shares) > 95_000


def test_rows_that_were_given_up_are_let_go_of() -> None:
    shares = Shares()
    (kept,) = wait(shares, Item(7))
    for waiter in wait(shares, *[Item(7)] * 10_000):
        shares.discard(waiter)
    assert len(shares) == 1
    assert sum(len(heap) for heap in shares._heaps()) < 2000
    assert take(shares) == [kept.row]


def test_a_planner_that_raises_loses_no_row() -> None:
    class Fails:
        def start(self, length: int) -> Filling:
            raise ZeroDivisionError

    shares = Shares()
    waiters = wait(shares, Item(), Item())
    taken: list[Waiter] = []
    with pytest.raises(ZeroDivisionError):
        shares.take(Fails(), taken)
    assert [*taken, *shares.clear()] == waiters
    assert len(shares) == shares.num_tokens == 0


@either
def test_a_long_request_ends_though_single_texts_of_its_task_never_do(planner: Planner) -> None:
    shares = Shares(padded=planner.padded)
    waiters = wait(shares, *[Item(20, "mine", next(NUMBERS))] * 100)
    wait(shares, *singles("mine", 40))
    num_batches = 0
    while not all(waiter.gone for waiter in waiters):
        taken = take(shares, planner)
        wait(shares, *singles("mine", len(taken)))  # forty of them wait at any time
        num_batches += 1
        assert num_batches < 400
    assert num_batches > 20  # and it does not go before all of them
