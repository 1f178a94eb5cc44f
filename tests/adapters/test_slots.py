import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import pytest

from adapters.errors import BankFull
from adapters.slots import Slots

Settle = Callable[[], Awaitable[None]]


@dataclass
class Bank:
    """Remembers what was written where; writes run while `open` is set.

    A version takes as many pages as it has letters.
    """

    rows: dict[int, str] = field(default_factory=dict)
    loads: list[str] = field(default_factory=list)
    absent: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def fetch(self, version: str) -> str:
        await asyncio.sleep(0)
        if version in self.absent:
            raise LookupError(f"{version} is absent")
        return version

    async def write(self, slot: int, version: str, gone: Sequence[int]) -> None:
        for left in gone:
            del self.rows[left]
        assert slot not in self.rows, "whoever sat here has not been let go"
        self.loads.append(version)
        self.rows[slot] = f"half of {version}"
        await self.open.wait()
        if version in self.broken:
            del self.rows[slot]
            raise ValueError(f"{version} is broken")
        self.rows[slot] = version

    def forget(self, slots: Sequence[int]) -> None:
        for left in slots:
            del self.rows[left]

    def slots(self, max_slots: int | None = None, num_pages: int = 1000) -> Slots[str]:
        return Slots(
            num_pages=num_pages, max_slots=max_slots,
            fetch=self.fetch, size=len, write=self.write, forget=self.forget,
        )  # fmt: skip


@dataclass
class Holder:
    """A call that pins a version until it is told to go."""

    slots: Slots[str]
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


async def use(slots: Slots[str], version: str) -> int:
    async with asyncio.timeout(5), slots.pin(version) as slot:
        return slot


async def test_a_version_is_loaded_once_and_stays(bank: Bank) -> None:
    slots = bank.slots(2)
    first = await use(slots, "a")
    assert await use(slots, "a") == first
    assert bank.loads == ["a"]
    assert bank.rows == {first: "a"}
    assert slots.resident == {"a": first}


async def test_slot_0_is_never_given(bank: Bank) -> None:
    slots = bank.slots(3)
    given = {await use(slots, version) for version in "abcdefgh"}
    assert given == {1, 2, 3}


async def test_the_least_recently_used_goes_first(bank: Bank) -> None:
    slots = bank.slots(3)
    for version in "abcab":
        await use(slots, version)
    await use(slots, "d")
    assert set(slots.resident) == {"a", "b", "d"}
    await use(slots, "e")
    assert set(slots.resident) == {"b", "d", "e"}


async def test_a_pinned_version_is_not_evicted(bank: Bank, settle: Settle) -> None:
    slots = bank.slots(2)
    held = Holder(slots, "a")
    await settle()
    for version in "bcdef":
        await use(slots, version)
    assert slots.resident["a"] == held.slot
    assert bank.rows[held.slot or 0] == "a"
    await held.leave()


async def test_many_pins_of_a_cold_version_share_one_load(bank: Bank, settle: Settle) -> None:
    bank.open.clear()
    slots = bank.slots(2)
    calls = [asyncio.ensure_future(use(slots, "a")) for _ in range(50)]
    await settle()
    assert slots.resident == {}  # not visible before its load has ended
    bank.open.set()
    assert len(set(await asyncio.gather(*calls))) == 1
    assert bank.loads == ["a"]


async def test_a_load_that_fails_fails_its_waiters_and_frees_its_slot(
    bank: Bank, settle: Settle
) -> None:
    slots = bank.slots(1)
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
    slots = bank.slots(1)
    bank.broken.add("a")
    for _ in range(3):
        with pytest.raises(ValueError, match="a is broken"):
            await use(slots, "a")
    bank.broken.clear()
    assert await use(slots, "a") == 1
    assert bank.loads == ["a"] * 4


async def test_a_failing_load_evicts_but_one_other_version(bank: Bank) -> None:
    slots = bank.slots(2)
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
    slots = bank.slots(2)
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
    slots = bank.slots(1)
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
    slots = bank.slots(1)
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
    slots = bank.slots(1)
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
    slots = bank.slots(1)
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

    async def fetch(version: str) -> str:
        for _ in range(chance.randrange(3)):
            await asyncio.sleep(0)
        return version

    async def write(slot: int, version: str, gone: Sequence[int]) -> None:
        for left in gone:
            rows.pop(left, None)
        assert slot not in writing
        assert not readers.get(slot), f"slot {slot} was overwritten while {readers[slot]} read it"
        writing.add(slot)
        rows[slot] = version
        assert sum(map(len, rows.values())) <= 12, "more pages are given than there are"
        rows[slot] = "½" * len(version)
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        writing.discard(slot)
        if chance.random() < 0.1:
            del rows[slot]
            raise ValueError("broken")
        rows[slot] = version

    def forget(gone: Sequence[int]) -> None:
        for left in gone:
            assert not readers.get(left), f"slot {left} was forgotten while it was read"
            rows.pop(left, None)

    slots = Slots(num_pages=12, max_slots=4, fetch=fetch, size=len, write=write, forget=forget)

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
        number = chance.randrange(12)
        calls.append(asyncio.ensure_future(call(chr(97 + number) * (1 + number % 7))))
        if chance.random() < 0.15:
            asyncio.get_running_loop().call_soon(chance.choice(calls).cancel)
        if chance.random() < 0.1:
            number = chance.randrange(12)
            slots.drop(chr(97 + number) * (1 + number % 7))
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
    left = set()
    for version in "abcdefghijklmnopqrst":
        try:
            left.add(await use(slots, version))
        except ValueError:
            continue
    assert left == {1, 2, 3, 4}
    for version in [*slots.resident]:
        slots.drop(version)
    assert (slots.pages_free, slots.slots_free, rows) == (12, 4, {})


async def test_a_newcomer_is_in_ram_before_anybody_leaves(bank: Bank) -> None:
    slots = bank.slots(2)
    await use(slots, "a")
    await use(slots, "b")
    bank.absent.add("c")
    with pytest.raises(LookupError, match="c is absent"):
        await use(slots, "c")
    assert set(slots.resident) == {"a", "b"}
    assert bank.loads == ["a", "b"]


async def test_as_many_stay_as_the_pages_hold_and_as_many_leave_as_a_newcomer_needs(
    bank: Bank,
) -> None:
    slots = bank.slots(num_pages=10)
    for version in ("a", "bb", "ccc", "dddd"):
        await use(slots, version)
    assert len(slots.resident) == 4
    await use(slots, "eee")
    assert set(slots.resident) == {"dddd", "eee", "ccc"}
    assert set(bank.rows.values()) == {"dddd", "eee", "ccc"}
    await use(slots, "f" * 10)
    assert set(bank.rows.values()) == {"f" * 10}


async def test_a_large_newcomer_is_not_kept_out_by_small_ones(bank: Bank, settle: Settle) -> None:
    slots = bank.slots(num_pages=4)
    held = [Holder(slots, version) for version in "abcd"]
    await settle()
    large = Holder(slots, "eeee")
    await settle()
    small = [Holder(slots, version) for version in "fghi"]
    await settle()
    for holder in held:
        assert large.slot is None
        await holder.leave()
        await settle()
    assert large.slot is not None
    await large.leave()
    for holder in small:
        await holder.leave()


async def test_what_is_kept_never_leaves_until_it_is_let_go(bank: Bank) -> None:
    slots = bank.slots(num_pages=3)
    await slots.keep("a")
    for version in ("b", "c", "d", "ee", "f"):
        await use(slots, version)
        assert "a" in slots.resident
    slots.let_go("a")
    await use(slots, "ggg")
    assert set(slots.resident) == {"ggg"}


async def test_what_has_no_room_beside_what_is_kept_is_refused_and_nobody_leaves(
    bank: Bank,
) -> None:
    slots = bank.slots(num_pages=4)
    await slots.keep("aa")
    await use(slots, "b")
    with pytest.raises(BankFull, match="no room for ccc beside the 1 adapters that are pinned"):
        await use(slots, "ccc")
    with pytest.raises(BankFull):
        await slots.keep("ddd")
    assert set(slots.resident) == {"aa", "b"}
    await use(slots, "ee")
    assert set(slots.resident) == {"aa", "ee"}


async def test_what_cannot_be_kept_is_not(bank: Bank) -> None:
    slots = bank.slots(1)
    bank.absent.add("a")
    with pytest.raises(LookupError):
        await slots.keep("a")
    bank.absent.clear()
    await use(slots, "a")
    await use(slots, "b")
    assert set(slots.resident) == {"b"}


async def test_what_is_dropped_is_gone_at_once_and_loaded_anew_by_the_next_pin(bank: Bank) -> None:
    slots = bank.slots(2, num_pages=5)
    await slots.keep("aaa")
    await use(slots, "b")
    assert (slots.slots_free, slots.pages_free) == (0, 1)
    for version in ("aaa", "aaa", "nowhere"):
        slots.drop(version)
    assert set(bank.rows.values()) == {"b"}
    assert (slots.slots_free, slots.pages_free) == (1, 4)
    await use(slots, "aaa")
    assert bank.loads == ["aaa", "b", "aaa"]
    await use(slots, "cc")  # "aaa" is not kept any more, "b" was used longer ago
    await use(slots, "dd")
    assert "aaa" not in slots.resident


async def test_what_is_dropped_leaves_when_the_last_call_that_holds_it_ends(
    bank: Bank, settle: Settle
) -> None:
    slots = bank.slots(num_pages=4)
    first, second = Holder(slots, "aa"), Holder(slots, "aa")
    await settle()
    slots.drop("aa")
    assert slots.resident == {}
    assert slots.pages_free == 2
    await first.leave()
    assert bank.rows == {1: "aa"}
    newer = Holder(slots, "aa")  # finds it gone
    await settle()
    assert (newer.slot, bank.rows) == (2, {1: "aa", 2: "aa"})
    await second.leave()
    assert bank.rows == {2: "aa"}
    assert slots.pages_free == 2
    await newer.leave()
    assert slots.resident == {"aa": 2}


async def test_what_is_dropped_while_it_loads_is_had_by_those_who_wait_and_then_leaves(
    bank: Bank, settle: Settle
) -> None:
    slots = bank.slots()
    bank.open.clear()
    waits = [Holder(slots, "a"), Holder(slots, "a")]
    left = asyncio.ensure_future(use(slots, "b"))
    await settle()
    slots.drop("a")
    slots.drop("b")
    left.cancel()
    await settle()
    bank.open.set()
    await settle()
    assert [holder.slot for holder in waits] == [1, 1]
    assert bank.rows == {1: "a"}  # nobody waits for "b"
    for holder in waits:
        await holder.leave()
    assert bank.rows == slots.resident == {}
    assert bank.loads == ["a", "b"]


async def test_what_leaves_for_another_may_be_dropped_as_well(bank: Bank, settle: Settle) -> None:
    slots = bank.slots(num_pages=2)
    held = Holder(slots, "aa")
    await settle()
    late = Holder(slots, "b")
    await settle()
    slots.drop("aa")
    assert late.slot is None
    await held.leave()
    await settle()
    assert late.slot == 1
    assert bank.rows == {1: "b"}
    assert slots.pages_free == 1
    await late.leave()


async def test_what_is_kept_again_after_it_was_dropped_stays(bank: Bank, settle: Settle) -> None:
    slots = bank.slots(1)
    bank.open.clear()
    call = asyncio.ensure_future(use(slots, "a"))
    await settle()
    slots.drop("a")
    keeps = asyncio.ensure_future(slots.keep("a"))
    await settle()
    bank.open.set()
    await keeps
    await call
    with pytest.raises(BankFull):
        await use(slots, "b")
    assert set(slots.resident) == {"a"}


async def test_fewer_slots_let_the_surplus_go_when_the_next_one_comes(bank: Bank) -> None:
    slots = bank.slots(4)
    for version in "abcd":
        await use(slots, version)
    slots.resize(2)
    assert (set(slots.resident), slots.slots_free) == (set("abcd"), 0)
    assert await use(slots, "d") == 4  # who is here is answered
    await use(slots, "e")
    assert set(slots.resident) == {"d", "e"}
    assert len(bank.rows) == 2
    slots.resize(3)
    assert slots.slots_free == 1
    await use(slots, "a")
    assert set(slots.resident) == {"a", "d", "e"}
    await slots.keep("a")
    slots.resize(1)
    with pytest.raises(BankFull):
        await use(slots, "b")
    slots.resize(None)
    await use(slots, "b")
    assert set(slots.resident) == {"a", "b", "d", "e"}
