import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from adapters.slots import Slots

Settle = Callable[[], Awaitable[None]]


@dataclass
class Bank:
    """Remembers what was loaded where; loads run while `open` is set."""

    rows: dict[int, str] = field(default_factory=dict)
    loads: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def load(self, version: str, slot: int) -> None:
        self.loads.append(version)
        self.rows[slot] = f"half of {version}"
        await self.open.wait()
        if version in self.broken:
            raise ValueError(f"{version} is broken")
        self.rows[slot] = version


@dataclass
class Holder:
    """A call that pins a version until it is told to go."""

    slots: Slots
    version: str
    slot: int | None = None
    go: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> int:
        async with self.slots.pin(self.version) as slot:
            self.slot = slot
            await self.go.wait()
            return slot

    async def leave(self) -> int:
        self.go.set()
        return await asyncio.wait_for(self.task, 5)


@pytest.fixture
def bank() -> Bank:
    bank = Bank()
    bank.open.set()
    return bank


async def use(slots: Slots, version: str) -> int:
    async with asyncio.timeout(5), slots.pin(version) as slot:
        return slot


async def test_a_version_is_loaded_once_and_stays(bank: Bank) -> None:
    slots = Slots(3, bank.load)
    first = await use(slots, "a")
    assert await use(slots, "a") == first
    assert bank.loads == ["a"]
    assert bank.rows == {first: "a"}
    assert slots.resident == {"a": first}


async def test_slot_0_is_never_given(bank: Bank) -> None:
    slots = Slots(4, bank.load)
    given = {await use(slots, version) for version in "abcdefgh"}
    assert given == {1, 2, 3}


@pytest.mark.parametrize("num_slots", [0, 1])
def test_a_bank_of_slot_0_alone_is_refused(num_slots: int, bank: Bank) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Slots(num_slots, bank.load)


async def test_the_least_recently_used_goes_first(bank: Bank) -> None:
    slots = Slots(4, bank.load)
    for version in "abcab":
        await use(slots, version)
    await use(slots, "d")
    assert set(slots.resident) == {"a", "b", "d"}
    await use(slots, "e")
    assert set(slots.resident) == {"b", "d", "e"}


async def test_a_pinned_version_is_not_evicted(bank: Bank, settle: Settle) -> None:
    slots = Slots(3, bank.load)
    held = Holder(slots, "a")
    await settle()
    for version in "bcdef":
        await use(slots, version)
    assert slots.resident["a"] == held.slot
    assert bank.rows[held.slot or 0] == "a"
    await held.leave()


async def test_many_pins_of_a_cold_version_share_one_load(bank: Bank, settle: Settle) -> None:
    bank.open.clear()
    slots = Slots(3, bank.load)
    calls = [asyncio.ensure_future(use(slots, "a")) for _ in range(50)]
    await settle()
    assert slots.resident == {}  # not visible before its load has ended
    bank.open.set()
    assert len(set(await asyncio.gather(*calls))) == 1
    assert bank.loads == ["a"]


async def test_a_load_that_fails_fails_its_waiters_and_frees_its_slot(
    bank: Bank, settle: Settle
) -> None:
    slots = Slots(2, bank.load)
    bank.broken.add("bad")
    bank.open.clear()
    calls = [asyncio.ensure_future(use(slots, "bad")) for _ in range(3)]
    other = asyncio.ensure_future(use(slots, "good"))
    await settle()
    assert bank.loads == ["bad"]  # the only slot is taken
    bank.open.set()
    for error in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(error, ValueError)
        assert str(error) == "bad is broken"
    assert await other == 1
    assert slots.resident == {"good": 1}


async def test_a_failed_load_is_tried_again_by_the_next_pin(bank: Bank) -> None:
    slots = Slots(2, bank.load)
    bank.broken.add("a")
    for _ in range(3):
        with pytest.raises(ValueError, match="a is broken"):
            await use(slots, "a")
    bank.broken.clear()
    assert await use(slots, "a") == 1
    assert bank.loads == ["a"] * 4


async def test_a_failing_load_evicts_but_one_other_version(bank: Bank) -> None:
    slots = Slots(3, bank.load)
    await use(slots, "a")
    await use(slots, "b")
    bank.broken.add("bad")
    for _ in range(5):
        with pytest.raises(ValueError, match="bad is broken"):
            await use(slots, "bad")
    assert set(slots.resident) == {"b"}


async def test_with_all_slots_pinned_a_pin_waits_and_then_goes_on(
    bank: Bank, settle: Settle
) -> None:
    slots = Slots(3, bank.load)
    a, b = Holder(slots, "a"), Holder(slots, "b")
    await settle()
    late = Holder(slots, "c")
    await settle()
    assert late.slot is None
    assert bank.loads == ["a", "b"]
    freed = await a.leave()
    await settle()
    assert late.slot == freed
    assert bank.rows[freed] == "c"
    await late.leave()
    await b.leave()


async def test_a_cold_version_is_not_kept_out_by_one_that_is_always_in_use(
    bank: Bank, settle: Settle
) -> None:
    slots = Slots(2, bank.load)
    held = Holder(slots, "hot")
    await settle()
    cold = Holder(slots, "cold")
    for _ in range(50):  # the next call for it comes before the last one has ended
        following = Holder(slots, "hot")
        await settle()
        await held.leave()
        await settle()
        held = following
        if cold.slot is not None:
            break
    assert cold.slot is not None
    await cold.leave()
    await held.leave()


async def test_a_cancelled_first_waiter_does_not_end_the_shared_load(
    bank: Bank, settle: Settle
) -> None:
    bank.open.clear()
    slots = Slots(2, bank.load)
    first, second = (asyncio.ensure_future(use(slots, "a")) for _ in range(2))
    await settle()
    first.cancel()
    await settle()
    assert first.cancelled()
    bank.open.set()
    assert await second == 1
    assert bank.loads == ["a"]


async def test_a_load_that_everybody_left_still_ends_and_holds_up_nobody(
    bank: Bank, settle: Settle
) -> None:
    bank.open.clear()
    slots = Slots(2, bank.load)
    left = asyncio.ensure_future(use(slots, "a"))
    await settle()
    waits = asyncio.ensure_future(use(slots, "b"))
    await settle()
    left.cancel()  # nobody holds "a" when its load ends, so "b" may have its slot
    await settle()
    bank.open.set()
    assert await waits == 1
    assert slots.resident == {"b": 1}


async def test_a_freshly_loaded_version_stays_until_its_waiter_has_it(
    bank: Bank, settle: Settle
) -> None:
    """Several versions fight for one slot: each must be had by its own waiter once loaded."""
    slots = Slots(2, bank.load)
    bank.open.clear()
    calls = [Holder(slots, version) for version in "abcd"]
    await settle()
    bank.open.set()
    for _ in calls:
        await settle()
        holder = next(call for call in calls if call.slot is not None and not call.task.done())
        assert bank.rows[1] == holder.version
        await holder.leave()
    assert sorted(bank.loads) == ["a", "b", "c", "d"]  # none was loaded twice


@pytest.mark.parametrize("seed", range(4))
async def test_no_slot_is_given_twice_under_random_stress(seed: int) -> None:
    chance = random.Random(seed)
    rows: dict[int, str] = {}
    readers: dict[int, int] = {}
    writing: set[int] = set()
    done = 0

    async def load(version: str, slot: int) -> None:
        assert slot not in writing
        assert not readers.get(slot), f"slot {slot} was overwritten while {readers[slot]} read it"
        writing.add(slot)
        rows[slot] = "half"
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        writing.discard(slot)
        if chance.random() < 0.1:
            raise ValueError("broken")
        rows[slot] = version

    slots = Slots(5, load)

    async def call(version: str) -> None:
        nonlocal done
        async with slots.pin(version) as slot:
            assert 0 < slot < 5
            readers[slot] = readers.get(slot, 0) + 1
            try:
                for _ in range(chance.randrange(6)):
                    assert rows[slot] == version
                    await asyncio.sleep(0)
                assert rows[slot] == version
                done += 1
            finally:
                readers[slot] -= 1

    calls = []
    for _ in range(800):
        calls.append(asyncio.ensure_future(call(f"v{chance.randrange(12)}")))
        if chance.random() < 0.15:
            asyncio.get_running_loop().call_soon(chance.choice(calls).cancel)
        if chance.random() < 0.3:
            await asyncio.sleep(0)
    async with asyncio.timeout(20):
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    wrong = [
        outcome
        for outcome in outcomes
        if isinstance(outcome, BaseException)
        and not isinstance(outcome, asyncio.CancelledError)
        and str(outcome) != "broken"
    ]
    assert not wrong
    assert done > 300
    seats = slots.resident.values()
    assert len(set(seats)) == len(seats) <= 4
    # Nothing leaked: every slot can still be had.
    rows.clear()
    left = set()
    for version in "abcdefghijklmnopqrst":
        try:
            left.add(await use(slots, version))
        except ValueError:
            continue
    assert left == {1, 2, 3, 4}
