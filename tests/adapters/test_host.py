import asyncio
from collections.abc import Awaitable, Callable

import pytest

from adapters.host import Host

Settle = Callable[[], Awaitable[None]]


@pytest.fixture
def host() -> Host[str]:
    return Host(10, len)


class Load:
    """Loads an item, when `open`, and counts how often it began."""

    def __init__(self, item: str = "item", *, open: bool = True) -> None:
        self.item = item
        self.num_calls = 0
        self.error: Exception | None = None
        self.open = asyncio.Event()
        if open:
            self.open.set()

    async def __call__(self) -> str:
        self.num_calls += 1
        await self.open.wait()
        if self.error is not None:
            raise self.error
        return self.item


def held(host: Host[str], names: str) -> str:
    return "".join(name for name in names if name in host._items)  # peek would count as a use


async def test_an_item_is_loaded_once(host: Host[str]) -> None:
    load = Load()
    assert await host.get("a", load) == "item"
    assert await host.get("a", load) == "item"
    assert load.num_calls == 1
    assert host.peek("a") == "item"
    assert host.peek("b") is None


async def test_calls_for_one_version_share_a_load(host: Host[str], settle: Settle) -> None:
    load = Load(open=False)
    calls = [asyncio.ensure_future(host.get("a", load)) for _ in range(20)]
    await settle()
    assert host.peek("a") is None
    load.open.set()
    assert await asyncio.gather(*calls) == ["item"] * 20
    assert load.num_calls == 1


async def test_different_versions_load_side_by_side(host: Host[str], settle: Settle) -> None:
    slow, fast = Load("slow", open=False), Load("fast")
    waits = asyncio.ensure_future(host.get("a", slow))
    assert await host.get("b", fast) == "fast"
    slow.open.set()
    assert await waits == "slow"


async def test_a_cancelled_caller_does_not_end_the_load(host: Host[str], settle: Settle) -> None:
    load = Load(open=False)
    first, second = (asyncio.ensure_future(host.get("a", load)) for _ in range(2))
    await settle()
    first.cancel()
    await settle()
    load.open.set()
    assert await second == "item"
    assert load.num_calls == 1


async def test_a_load_that_everybody_left_is_kept_all_the_same(
    host: Host[str], settle: Settle
) -> None:
    load = Load(open=False)
    call = asyncio.ensure_future(host.get("a", load))
    await settle()
    call.cancel()
    load.open.set()
    await settle()
    assert host.peek("a") == "item"


async def test_a_failure_reaches_all_that_waited_and_is_not_remembered(
    host: Host[str], settle: Settle
) -> None:
    load = Load(open=False)
    load.error = ValueError("broken")
    calls = [asyncio.ensure_future(host.get("a", load)) for _ in range(3)]
    await settle()
    load.open.set()
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [str(error) for error in errors] == ["broken"] * 3
    assert host.used_bytes == 0
    load.error = None
    assert await host.get("a", load) == "item"
    assert load.num_calls == 2


async def test_the_budget_lets_the_least_recently_used_go(host: Host[str]) -> None:
    for name in "abc":
        host.put(name, "xxx")
    assert host.used_bytes == 9
    host.peek("a")
    host.put("d", "xxx")
    assert held(host, "abcd") == "acd"
    await host.get("c", Load())
    host.put("e", "xxxxx")
    assert held(host, "abcde") == "ce"
    assert host.used_bytes == 8


async def test_a_newcomer_over_the_budget_is_loaded_and_nobody_goes_for_it(
    host: Host[str],
) -> None:
    host.put("a", "xxx")
    load = Load("x" * 11)
    assert await host.get("big", load) == "x" * 11
    assert held(host, "a") == "a"
    assert host.peek("big") is None
    assert host.used_bytes == 3
    host.put("a", "x" * 11)  # a new copy of what is here
    assert host.used_bytes == 0
    host.put("full", "x" * 10)
    assert host.used_bytes == 10


def test_an_item_put_again_is_counted_once(host: Host[str]) -> None:
    host.put("a", "xx")
    host.put("b", "xx")
    host.put("a", "xxx")
    assert host.used_bytes == 5
    assert host.peek("a") == "xxx"
    host.put("c", "xxxxxx")  # "b" is the older now
    assert held(host, "abc") == "ac"


async def test_what_is_dropped_is_gone_and_its_load_is_not_kept(
    host: Host[str], settle: Settle
) -> None:
    host.put("a", "xxx")
    host.put("b", "xx")
    for name in ("a", "a", "nowhere"):
        host.drop(name)
    assert (set(host.versions), host.used_bytes) == ({"b"}, 2)
    load = Load("xxx", open=False)
    call = asyncio.ensure_future(host.get("a", load))
    await settle()
    host.drop("a")
    later = asyncio.ensure_future(host.get("a", load))  # asks anew
    await settle()
    load.open.set()
    assert (await call, await later) == ("xxx", "xxx")
    assert load.num_calls == 2
    host.drop("a")
    load.open.clear()
    call = asyncio.ensure_future(host.get("a", load))
    await settle()
    host.drop("a")
    load.open.set()
    assert await call == "xxx"
    assert (set(host.versions), host.used_bytes) == ({"b"}, 2)


async def test_a_smaller_budget_holds_at_once(host: Host[str]) -> None:
    for name in "abc":
        host.put(name, "xxx")
    host.resize(4)
    assert held(host, "abc") == "c"
    assert host.used_bytes == 3
