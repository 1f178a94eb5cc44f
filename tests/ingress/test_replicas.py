"""Rows over several replicas that die, leave, or cannot be reached. No base, no Ray."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from adapters.errors import AdapterRefused
from deployments.errors import BatchLoopDied, NotReady, Overloaded
from deployments.ingress import outbox, replicas
from deployments.ingress.outbox import CallLost, ReplicaLost
from deployments.ingress.replicas import Replicas
from deployments.model.exchange import Exchange, Ways
from deployments.model.news import News
from deployments.room import Room
from deployments.rows import Facts, Parcel, Reply, Residency, Row


class Replica:
    """Answers a row by its first id after a moment, over the exchange of a real one."""

    def __init__(self, name: str) -> None:
        self.took_s = 0.002
        self.num_rows = 0
        self.error: Exception | None = None
        self.exchange = Exchange(
            name,
            Ways(self._pin, self._enter, _as_data, lambda task, target_s: None),
            News(),
            Room(10**4),
        )

    @asynccontextmanager
    async def _pin(self, task: str, version: str) -> AsyncIterator[int]:
        yield 1

    def _enter(self, row: Row) -> asyncio.Future[Any]:
        self.num_rows += 1
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        first = [float(row.tokens.ids[0])]
        loop.call_later(
            self.took_s, lambda: answer.done() or answer.set_result(self.error or first)
        )
        return answer


def _as_data(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


class Cluster:
    """What Serve does with calls: each may die, be lost before or behind a replica, or go astray.

    Attributes:
        running: The replicas that Serve knows.
        astray: How many of the next calls to a replica reach another one.
        broken: How many of the next calls to a replica are lost with an error, and whether before
            they reach it.
        silent: Replicas that do not say who they are.
        dead: Those that die under whoever calls.
    """

    def __init__(self, *names: str) -> None:
        self.replicas = {name: Replica(name) for name in names}
        self.running = [*names]
        self.astray: Counter[str] = Counter()
        self.broken: dict[str, list[tuple[BaseException, bool]]] = {}
        self.silent: set[str] = set()
        self.dead: set[str] = set()
        self.late = False

    async def publish(self, heard: dict[str, int]) -> list[tuple[str, Residency | None] | None]:
        await asyncio.sleep(0)
        if self.late:
            raise NotReady("they did not answer in time")
        return [None if name in self.silent else (name, None) for name in self.running]

    async def exchange(
        self, replica: str, ingress: str, heard: int, parcels: Sequence[Parcel], gone: Sequence[int]
    ) -> Reply:
        await asyncio.sleep(0.001)
        if replica in self.dead:
            raise ReplicaLost("it died")
        others = [name for name in self.running if name != replica]
        if replica not in self.running or self.astray[replica]:
            self.astray[replica] -= 1
            return self.replicas[others[0]].exchange.not_taken()
        broken = self.broken.get(replica)
        if broken and broken[0][1]:
            raise broken.pop(0)[0]
        reply = await self.replicas[replica].exchange.call(ingress, heard, parcels, gone)
        if replica in self.dead:
            raise ReplicaLost("it died")
        if broken and (reply["answers"] or reply["failed"]):
            raise broken.pop(0)[0]
        return reply


class Asker:
    """Asks for numbers, which are answered by themselves."""

    def __init__(self, cluster: Cluster, facts: Facts) -> None:
        self.replicas = Replicas(cluster)
        self.facts = facts

    async def ask(self, *numbers: int) -> None:
        inputs: Any = [([number], None) for number in numbers]
        async with asyncio.timeout(5):
            assert await self.replicas.ask(self.facts, inputs) == [[float(n)] for n in numbers]


@pytest.fixture
def two() -> Cluster:
    return Cluster("a", "b")


@pytest.fixture
def one() -> Cluster:
    return Cluster("a")


@pytest.fixture
def asking(make_facts: Callable[..., Facts]) -> Callable[[Cluster], Asker]:
    return lambda cluster: Asker(cluster, make_facts())


Asking = Callable[[Cluster], Asker]
LOST = CallLost("the connection broke")


async def many(asker: Asker, num: int = 200) -> None:
    await asyncio.gather(*(asker.ask(n, n + 1) for n in range(num)))
    counted = asker.replicas._placement._replicas.values()
    assert [replica.load for replica in counted] == [0] * len(counted)


@pytest.mark.parametrize("names", ["a", "ab", "abc"])
async def test_every_row_has_its_own_answer(asking: Asking, names: str) -> None:
    cluster = Cluster(*names)
    asker = asking(cluster)
    await many(asker)
    assert sum(replica.num_rows for replica in cluster.replicas.values()) == 400
    assert all(replica.num_rows > 50 for replica in cluster.replicas.values())


async def test_a_call_that_went_astray_costs_no_row(asking: Asking, two: Cluster) -> None:
    asker = asking(two)
    await asker.ask(1)
    two.astray.update({"a": 5, "b": 5})
    await many(asker)
    assert sum(replica.num_rows for replica in two.replicas.values()) == 401  # nothing ran twice


async def test_astray_for_ever_is_not_for_ever_while_another_replica_is_well(
    asking: Asking, two: Cluster
) -> None:
    asker = asking(two)
    await asker.ask(1)
    two.astray["a"] = 10**9
    await many(asker)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("error", [LOST, asyncio.CancelledError()], ids=["lost", "cancelled"])
@pytest.mark.parametrize("names", ["a", "ab"])
async def test_lost_calls_and_replies_cost_no_row_and_hang_none(
    asking: Asking, names: str, error: BaseException, before: bool
) -> None:
    cluster = Cluster(*names)
    asker = asking(cluster)
    await asker.ask(1)
    cluster.broken = {name: [(error, before)] * 4 for name in names}
    await many(asker)
    assert not any(cluster.broken.values())


async def test_a_replica_that_does_not_say_who_it_is_keeps_its_rows(
    asking: Asking, two: Cluster
) -> None:
    asker = asking(two)
    await asker.ask(1)
    two.replicas["a"].took_s = two.replicas["b"].took_s = 0.3
    going = asyncio.ensure_future(many(asker, 20))
    await asyncio.sleep(0.02)
    two.silent = {"a"}
    await asker.replicas._look_once()
    two.late = True
    with pytest.raises(NotReady):
        await asker.replicas._look_once()
    await going
    assert sum(replica.num_rows for replica in two.replicas.values()) == 41


async def test_rows_of_a_replica_that_dies_are_asked_of_another(
    asking: Asking, two: Cluster
) -> None:
    asker = asking(two)
    two.replicas["a"].took_s = 0.2
    going = asyncio.ensure_future(many(asker, 20))
    await asyncio.sleep(0.05)
    two.dead, two.running = {"a"}, ["b"]
    await going
    assert two.replicas["a"].num_rows > 0


async def test_rows_of_a_replica_that_serve_has_removed_are_asked_of_another(
    asking: Asking, two: Cluster
) -> None:
    asker = asking(two)
    two.replicas["a"].took_s = 60.0
    going = asyncio.ensure_future(many(asker, 20))
    await asyncio.sleep(0.05)
    two.running = ["b"]
    await asker.replicas._look_once()
    await going


async def test_when_the_only_replica_dies_rows_wait_for_the_next(
    asking: Asking, one: Cluster
) -> None:
    asker = asking(one)
    one.replicas["a"].took_s = 60.0
    going = asyncio.ensure_future(many(asker, 20))
    await asyncio.sleep(0.05)
    one.dead, one.running = {"a"}, []
    await asyncio.sleep(0.3)
    one.replicas["b"] = Replica("b")
    one.running = ["b"]
    await going


async def test_a_row_under_which_two_replicas_died_is_asked_of_no_third(asking: Asking) -> None:
    cluster = Cluster("a", "b", "c")
    asker = asking(cluster)
    await asker.ask(1)
    cluster.dead = {"a", "b", "c"}
    with pytest.raises(NotReady, match="was lost"):
        await asker.ask(2)
    assert len(asker.replicas._outboxes) >= 1


async def test_a_row_whose_replicas_are_lost_one_after_another_costs_three_at_most(
    asking: Asking,
) -> None:
    cluster = Cluster(*"abcdef")
    asker = asking(cluster)
    await asker.ask(1)
    before = {name: replica.num_rows for name, replica in cluster.replicas.items()}
    cluster.broken = {name: [(LOST, False)] * 100 for name in "abcdef"}
    with pytest.raises(NotReady, match="was lost"):
        await asker.ask(2)
    had_it = [n for n, replica in cluster.replicas.items() if replica.num_rows > before[n]]
    assert len(had_it) == 3


async def test_who_the_replicas_are_is_known_though_serve_cancels_a_call(
    asking: Asking, one: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    asker = asking(one)
    await asker.ask(1)
    real = one.publish

    async def publish(heard: dict[str, int]) -> Any:
        monkeypatch.setattr(one, "publish", real)
        raise asyncio.CancelledError

    monkeypatch.setattr(one, "publish", publish)
    one.replicas["b"] = Replica("b")
    one.running = ["b"]
    one.dead = {"a"}
    await asker.ask(2)
    assert one.replicas["b"].num_rows == 1


async def test_what_no_call_reaches_is_given_up_after_a_while(
    asking: Asking, one: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(outbox, "_PAUSE_S", 0.01)
    asker = asking(one)
    await asker.ask(1)
    one.broken["a"] = [(LOST, True)] * 10**4
    with pytest.raises(NotReady, match="was lost"):
        await asker.ask(2)
    assert 10 < 10**4 - len(one.broken["a"]) < 60  # not one call on another's heels
    one.broken.clear()
    await asker.ask(3)


async def test_without_any_replica_a_row_waits_and_is_then_turned_away(
    asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "_PATIENCE_S", 0.2)
    with pytest.raises(NotReady, match="no model replica is running"):
        await asking(Cluster()).ask(1)


async def test_what_a_replica_cannot_answer_another_may(asking: Asking, two: Cluster) -> None:
    asker = asking(two)
    two.replicas["a"].error = BatchLoopDied("over")
    await many(asker, 20)
    assert two.replicas["b"].num_rows >= 40
    two.replicas["b"].error = BatchLoopDied("over")
    with pytest.raises(NotReady, match="was lost"):
        await asker.ask(1)


async def test_where_one_replica_has_too_much_another_answers(asking: Asking, two: Cluster) -> None:
    asker = asking(two)
    two.replicas["a"].error = Overloaded("too many")
    await many(asker, 20)
    two.replicas["b"].error = Overloaded("too many")
    with pytest.raises(Overloaded, match="too many"):
        await asker.ask(1)


@pytest.mark.parametrize(
    ("error", "told"), [(Overloaded("too many"), Overloaded), (BatchLoopDied("over"), NotReady)]
)
async def test_what_the_only_replica_cannot_answer_it_is_not_asked_again(
    asking: Asking, error: Exception, told: type[Exception]
) -> None:
    one = Cluster("a")
    asker = asking(one)
    await asker.ask(1)
    one.replicas["a"].error = error
    with pytest.raises(told):
        await asyncio.wait_for(asker.ask(2), 1)
    assert one.replicas["a"].num_rows == 2


async def test_an_adapter_s_error_is_the_same_everywhere(asking: Asking, two: Cluster) -> None:
    for replica in two.replicas.values():
        replica.error = AdapterRefused("mood", ["no head"])
    with pytest.raises(AdapterRefused):
        await asking(two).ask(1)
    assert sum(replica.num_rows for replica in two.replicas.values()) == 1
