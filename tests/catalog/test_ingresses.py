"""Who is waited for: the ingresses are names in a list, and their polls are calls."""

import asyncio
import time

import pytest

from deployments.catalog.ingresses import Ingresses


class Serve:
    """Its list of replicas, which a test changes."""

    def __init__(self, *names: str) -> None:
        self.running: dict[str, str] | None = {name: f"actor-{name}" for name in names}
        self.dead: set[str] = set()
        self.ingresses = Ingresses(self.list, self.is_dead)

    async def list(self) -> dict[str, str] | None:
        await asyncio.sleep(0)
        return self.running

    async def is_dead(self, actor: str) -> bool:
        return actor.removeprefix("actor-") in self.dead


async def test_all_that_are_listed_are_waited_for() -> None:
    serve = Serve("a", "b")
    reaching = asyncio.ensure_future(serve.ingresses.reach(7, 5.0))
    serve.ingresses.hold("a", 7)
    await asyncio.sleep(0.05)
    serve.ingresses.hold("b", 6)
    await asyncio.sleep(0.05)
    assert not reaching.done()
    serve.ingresses.hold("b", 8)
    assert await asyncio.wait_for(reaching, 1) == []
    assert await serve.ingresses.reach(7, 0.0) == []


async def test_one_that_does_not_poll_is_waited_for_and_named() -> None:
    """As one does that Serve cannot reach for a moment: it is in the list all the same."""
    serve = Serve("a", "silent")
    serve.ingresses.hold("a", 7)
    started_s = time.monotonic()
    assert await serve.ingresses.reach(7, 0.8) == ["silent"]
    assert 0.8 <= time.monotonic() - started_s < 3


@pytest.mark.parametrize("how", ["dies", "leaves the list"])
async def test_one_that_ends_is_waited_for_no_longer(how: str) -> None:
    serve = Serve("a", "ending")
    serve.ingresses.hold("a", 7)
    reaching = asyncio.ensure_future(serve.ingresses.reach(7, 5.0))
    await asyncio.sleep(0.05)
    if how == "dies":
        serve.dead.add("ending")
    else:
        serve.running = {"a": "actor-a"}
    assert await asyncio.wait_for(reaching, 2) == []


async def test_several_changes_wait_at_once() -> None:
    serve = Serve("a", "b")
    reaching = [asyncio.ensure_future(serve.ingresses.reach(n, 5.0)) for n in range(1, 6)]
    for revision in (3, 5):
        for name in "ab":
            await asyncio.sleep(0.01)
            serve.ingresses.hold(name, revision)
    async with asyncio.timeout(1):
        assert await asyncio.gather(*reaching) == [[]] * 5


async def test_without_a_list_nobody_says_that_everybody_knows() -> None:
    serve = Serve()
    serve.running = None
    (said,) = await serve.ingresses.reach(1, 0.1)
    assert "cannot be listed" in said


async def test_who_comes_under_another_name_holds_nothing_yet() -> None:
    serve = Serve("a")
    serve.ingresses.hold("a", 7)
    serve.running = {"b": "actor-b"}
    assert await serve.ingresses.reach(7, 0.0) == ["b"]
