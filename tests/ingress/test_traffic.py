import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from deployments.ingress.traffic import Splitter, Traffic
from deployments.snapshot import TaskRecord

A, B, C, D = "aaaaaaaa", "bbbbbbbb", "cccccccc", "dddddddd"


def record(traffic: dict[str, float], active: str = A, **changes: Any) -> TaskRecord:
    versions = {v: {"created_s": 1.0, "by": "me", "source": "upload"} for v in (A, B, C, D)}
    return TaskRecord.model_validate(
        {"revision": 1, "active": active, "versions": versions, "traffic": traffic, **changes}
    )


def shares_of(one: TaskRecord) -> dict[str, float]:
    return {**one.traffic, one.active: 1 - sum(one.traffic.values())}


@pytest.fixture
def traffic() -> Traffic:
    return Traffic(random.Random(5).random)


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.1, 1 / 3, 0.5, 0.9, 1.0])
def test_a_share_is_never_a_turn_off(share: float) -> None:
    splitter, taken = Splitter(share, random.Random(1).random), 0
    for n in range(1, 20_001):
        taken += splitter.take()
        assert abs(taken - share * n) < 1 + 1e-6


@pytest.mark.parametrize("period", [2, 3, 10])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_caller_s_pattern_meets_no_pattern(period: int, share: float) -> None:
    splitter, taken = Splitter(share, random.Random(2).random), Counter[int]()
    for n in range(10_000 * period):
        taken[n % period] += splitter.take()
    for place in range(period):
        assert taken[place] / 10_000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("shares", "bound"), [({B: 0.1}, 1), ({B: 0.3, C: 0.2}, 2), ({B: 0.07, C: 0.4, D: 0.33}, 3)]
)
def test_counts_are_the_shares_after_any_number_of_requests(
    traffic: Traffic, shares: dict[str, float], bound: int
) -> None:
    one, counts = record(shares), Counter[str]()
    for n in range(1, 10_001):
        counts[traffic.choose("mood", one)] += 1
        assert all(
            abs(counts[version] - share * n) < bound + 1e-6
            for version, share in shares_of(one).items()
        )
    assert sum(counts.values()) == 10_000


def test_tasks_that_take_turns_each_get_their_own_shares(traffic: Traffic) -> None:
    half, counts = record({B: 0.5}), Counter[tuple[str, str]]()
    for n in range(4000):
        task = ("mood", "spam")[n % 2]
        counts[task, traffic.choose(task, half)] += 1
    assert all(abs(count - 1000) < 1 for count in counts.values())


def test_another_change_of_the_task_begins_no_new_count(traffic: Traffic) -> None:
    counts = Counter[str]()
    for n in range(1000):
        counts[traffic.choose("mood", record({B: 0.01}, revision=n))] += 1
    assert abs(counts[B] - 10) < 1


@pytest.mark.parametrize("key", [None, "customer"])
def test_a_version_without_traffic_answers_nothing(traffic: Traffic, key: str | None) -> None:
    whole = record({B: 0.5, C: 0.5}, fallback=D, shadow={"version": D})
    keys: Callable[[int], str | None] = lambda n: key and f"{key}{n}"  # noqa: E731
    assert {traffic.choose("mood", whole, keys(n)) for n in range(2000)} == {B, C}
    alone = record({B: 1.0})
    assert {traffic.choose("mood", alone, keys(n)) for n in range(2000)} == {B}
    assert {traffic.choose("mood", record({}), keys(n)) for n in range(20)} == {A}


def choices(shares: dict[str, float], num_keys: int, task: str = "mood") -> list[str]:
    traffic, one = Traffic(), record(shares)
    return [traffic.choose(task, one, f"user-{n}") for n in range(num_keys)]


def test_a_key_sticks_in_every_process_and_keys_come_out_by_share() -> None:
    shares = {B: 0.1, C: 0.25}
    chosen = choices(shares, 20_000)
    assert chosen == choices(shares, 20_000)
    # In another process too: found once, and never to change.
    assert "".join(version[0] for version in chosen[:24]) == "abccabaaaaaaaaaacbaabaaa"
    counts = Counter(chosen)
    for version, share in shares_of(record(shares)).items():
        assert counts[version] / 20_000 == pytest.approx(share, abs=0.012)  # four deviations


def test_only_keys_that_must_move_when_the_share_of_one_of_two_grows() -> None:
    before, after = choices({B: 0.1}, 20_000), choices({B: 0.3}, 20_000)
    moved = {pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]}
    assert moved == {(A, B)}
    num_moved = sum(a != b for a, b in zip(before, after, strict=True))
    assert num_moved == after.count(B) - before.count(B)


def test_of_three_versions_no_more_keys_move_than_is_said() -> None:
    before, after = choices({B: 0.1, C: 0.3}, 20_000), choices({B: 0.3, C: 0.3}, 20_000)
    part = sum(a != b for a, b in zip(before, after, strict=True)) / 20_000
    assert 0.19 < part < 2 * 0.2 / 1.2 + 0.01


def test_a_key_of_one_task_says_nothing_of_another() -> None:
    pairs = zip(choices({B: 0.5}, 4000), choices({B: 0.5}, 4000, "spam"), strict=True)
    assert sum(a == b for a, b in pairs) / 4000 == pytest.approx(0.5, abs=0.04)


def test_any_string_is_a_key(traffic: Traffic) -> None:
    for key in ("\ud800", "ÿ", "x" * 10_000, "\0"):
        assert traffic.choose("mood", record({B: 0.5}), key) in (A, B)
    plain = Counter(traffic.choose("mood", record({B: 0.5}), "") for _ in range(100))
    assert plain[A] == plain[B] == 50  # an empty one is none
