"""Where rows go, without a replica."""

import itertools
import random
from collections import Counter, OrderedDict

import pytest

from deployments.ingress.placement import Placement
from deployments.rows import Residency

ROW = 32  # of load
NUM_REQUESTS = 40_000
PER_S = 500.0


def told(*held: str, number: int = 1, whole: bool = True, crowded: bool = False) -> Residency:
    return {
        "number": number,
        "whole": whole,
        "held": dict.fromkeys(held, True),
        "crowded": crowded,
    }


def made(*names: str, held: tuple[str, ...] = (), crowded: bool = False) -> Placement:
    placement = Placement()
    for name in names:
        placement.join(name)
        placement.hear(name, told(*held, crowded=crowded))
    return placement


def test_there_is_nowhere_to_go_without_a_replica() -> None:
    assert Placement().place("a@1", ROW) is None


def test_what_all_hold_goes_to_the_replica_with_the_fewest_rows() -> None:
    placement = made("x", "y", "z", held=("a@1",), crowded=True)
    assert Counter(placement.place("a@1", ROW) for _ in range(30)) == {"x": 10, "y": 10, "z": 10}
    for _ in range(5):
        placement.done("y", ROW)
    assert {placement.place("a@1", ROW) for _ in range(5)} == {"y"}


def test_a_version_stays_where_it_is_while_slots_are_few_and_its_replica_has_room() -> None:
    placement = made("x", "y", crowded=True)
    placement.hear("y", told("a@1", number=2, crowded=True))
    assert {placement.place("a@1", ROW) for _ in range(8)} == {"y"}


def test_a_hot_version_spreads_as_its_replicas_fill_and_never_waits_behind_one() -> None:
    placement = made("x", "y", "z", "w", crowded=True)
    chosen = Counter(placement.place("hot@1", ROW) for _ in range(64))
    assert set(chosen) == {"x", "y", "z", "w"}
    assert max(chosen.values()) - min(chosen.values()) <= 9


def test_with_slots_to_spare_a_free_replica_is_taken_at_once() -> None:
    placement = made("x", "y")
    first = placement.place("a@1", ROW)
    assert placement.place("a@1", ROW) != first


def test_two_ingresses_take_the_same_replica_for_a_version() -> None:
    one, other = made("x", "y", "z"), made("z", "x", "y")
    names = [f"a{n}@1" for n in range(50)]
    for name in names:
        chosen = [placement.place(name, ROW) for placement in (one, other)]
        assert chosen[0] == chosen[1]
        for placement in (one, other):
            placement.done(str(chosen[0]), ROW)


def test_rows_that_failed_somewhere_go_elsewhere_if_there_is_an_elsewhere() -> None:
    placement = made("x", "y", held=("a@1",))
    assert {placement.place("a@1", ROW, ("x",)) for _ in range(9)} == {"y"}
    placement.leave("y")
    assert placement.place("a@1", ROW, ("x",)) == "x"


def test_a_shunned_replica_is_avoided_for_a_while() -> None:
    now = [0.0]
    placement = Placement(lambda: now[0])
    for name in ("x", "y"):
        placement.join(name)
    placement.shun("x")
    assert {placement.place("a@1", ROW) for _ in range(5)} == {"y"}
    now[0] = 60.0
    assert placement.place("a@1", ROW) == "x"


def test_news_are_laid_over_what_is_known_and_old_ones_are_not() -> None:
    placement = made("x", "y", crowded=True)
    placement.hear("x", {"number": 5, "whole": False, "held": {"a@1": True}, "crowded": True})
    placement.hear("x", {"number": 4, "whole": False, "held": {"a@1": False}, "crowded": True})
    assert placement.heard == {"x": 5, "y": 1}
    assert {placement.place("a@1", ROW) for _ in range(8)} == {"x"}


class Slots:
    """A replica's slots, least recently used first out."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots, self.held = num_slots, OrderedDict[str, None]()
        self.number, self.crowded = 0, False
        self.changed: dict[str, bool] = {}

    def use(self, version: str) -> bool:
        hit = version in self.held
        self.held[version] = None
        self.held.move_to_end(version)
        if not hit:
            self.number += 1
            self.changed[version] = True
            if len(self.held) > self.num_slots:
                self.crowded = True
                self.number += 1
                self.changed[self.held.popitem(last=False)[0]] = False
        return hit

    def news(self) -> Residency:
        changed, self.changed = self.changed, {}
        return {"number": self.number, "whole": False, "held": changed, "crowded": self.crowded}


@pytest.mark.parametrize("num_loaded", [8, 32, 64])  # rows in flight at a time
def test_four_hundred_adapters_over_four_replicas_are_nearly_always_resident(
    num_loaded: int,
) -> None:
    chance = random.Random(7)
    versions = [f"task-{n}@1" for n in range(400)]
    weights = [1 / (n + 1) for n in range(400)]

    def share_of_misses(placed: bool) -> float:
        now_s = itertools.count(step=1 / PER_S)
        placement = Placement(lambda: next(now_s))
        replicas = {name: Slots(128) for name in ("x", "y", "z", "w")}
        for name in replicas:
            placement.join(name)
        flying: list[str] = []
        misses = 0
        for version in chance.choices(versions, weights, k=NUM_REQUESTS):
            name = placement.place(version, ROW) if placed else chance.choice([*replicas])
            assert name is not None
            flying.append(name)
            misses += not replicas[name].use(version)  # of an empty slot too
            while len(flying) >= num_loaded:
                done = flying.pop(chance.randrange(len(flying)))
                placement.done(done, ROW)
                placement.hear(done, replicas[done].news())
        return misses / NUM_REQUESTS

    ours, default = share_of_misses(True), share_of_misses(False)
    print(f"{num_loaded} rows in flight: misses {ours:.2%}, by chance {default:.2%}")
    assert ours <= 0.05
    assert 2 * ours <= default


@pytest.mark.parametrize("crowded", [True, False])
@pytest.mark.parametrize("num_loaded", [4, 8, 32, 256])  # rows in flight at a time
def test_a_version_that_takes_all_traffic_is_soon_shared_by_all_replicas(
    num_loaded: int, crowded: bool
) -> None:
    names = ("x", "y", "z", "w")
    placement = made(*names, crowded=crowded)
    placement.hear("x", told("hot@1", number=2, crowded=crowded))
    flying = dict.fromkeys(names, 0)
    answered = Counter[str]()
    for _ in range(num_loaded):
        flying[str(placement.place("hot@1", ROW))] += 1
    for _ in range(1000):  # each computes a row, and whoever has its answer asks again
        for name in names:
            if flying[name]:
                flying[name] -= 1
                answered[name] += 1
                placement.done(name, ROW)
                flying[str(placement.place("hot@1", ROW))] += 1
    # None was ever idle, but for a moment while it was not known to be hot.
    assert all(answered[name] >= 980 for name in names)


def test_a_large_request_goes_to_all_replicas_and_a_small_one_to_the_least_loaded() -> None:
    names = ("x", "y", "z", "w")
    placement = made(*names, crowded=True)
    placement.hear("x", told("bulk@1", number=2, crowded=True))
    chunks = Counter(placement.place("bulk@1", 32 * ROW) for _ in range(16))
    assert chunks == dict.fromkeys(names, 4)
    for _ in range(4):
        placement.done("z", 32 * ROW)
    assert {placement.place(f"small-{n}@1", ROW) for n in range(8)} == {"z"}


def test_long_rows_weigh_more_than_short_ones() -> None:
    placement = made("x", "y", held=("a@1",))
    long = placement.place("a@1", 512)
    short = {placement.place("a@1", 16) for _ in range(20)}
    assert short == {"x", "y"} - {long}
