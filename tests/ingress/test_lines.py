"""Calls of an ingress past Serve: real connections, between people who know and do not know."""

import asyncio
import os
import pickle
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from deployments.frames import Address, Frames
from deployments.ingress import lines
from deployments.ingress.lines import Line, Lines
from deployments.ingress.outbox import ReplicaLost
from deployments.model import listener
from deployments.model.listener import Listener

HOST = "127.0.0.1"


class Replica:
    """Answers a call with what it was given, once its gate, if it has one, is open."""

    def __init__(self) -> None:
        self.gates: dict[str, asyncio.Event] = {}
        self.cancelled: list[str] = []
        self.listener = Listener(self.call)

    async def call(self, word: str, *rest: Any) -> Any:
        assert rest == (0, [], [])
        if word == "raise":
            raise RuntimeError("nothing can be said")
        try:
            if word in self.gates:
                await self.gates[word].wait()
        except asyncio.CancelledError:
            self.cancelled.append(word)
            raise
        return word.upper()

    async def address(self, _: str) -> Address | None:
        return self.listener.address


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest_asyncio.fixture
async def replica() -> AsyncIterator[Replica]:
    replica = Replica()
    await replica.listener.start(HOST)
    yield replica
    await replica.listener.close()


@pytest_asyncio.fixture
async def to(replica: Replica) -> AsyncIterator[Lines]:
    to = Lines(replica.address)
    yield to
    to.keep([])


def address(replica: Replica) -> Address:
    assert replica.listener.address is not None
    return replica.listener.address


async def opened(to: Lines, name: str = "r1") -> Line:
    async with asyncio.timeout(5):
        while (line := to.to(name)) is None:
            await asyncio.sleep(0.01)
    return line


async def say(line: Line, word: str) -> Any:
    return await line.call(word, 0, [], [])


async def until(happened: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not happened():
            await asyncio.sleep(0.01)


async def stranger(where: Address, *messages: bytes) -> bytes:
    """Says something to a replica, and returns all that it says until it hangs up."""
    reader, writer = await asyncio.open_connection(where.host, where.port)
    for message in messages:
        writer.write(len(message).to_bytes(4, "little") + message)
    async with asyncio.timeout(5):
        said = await reader.read()
    writer.close()
    return said


async def test_each_call_has_its_own_reply_whichever_is_first(replica: Replica, to: Lines) -> None:
    line = await opened(to)
    replica.gates["slow"] = asyncio.Event()
    slow = asyncio.create_task(say(line, "slow"))
    assert await asyncio.gather(*(say(line, f"word{n}") for n in range(50))) == [
        f"WORD{n}" for n in range(50)
    ]
    assert not slow.done()
    replica.gates["slow"].set()
    assert await slow == "SLOW"


async def test_there_is_one_connection_a_replica(replica: Replica, to: Lines) -> None:
    assert to.to("r1") is None
    assert to.to("r1") is None
    line = await opened(to)
    assert to.to("r1") is line
    assert len(replica.listener._calls) == 1


@pytest.mark.parametrize("first", [b"", b"x" * 32, b"\0" * 32], ids=["empty", "wrong", "zeros"])
async def test_a_stranger_is_told_nothing_and_not_listened_to(
    replica: Replica, tmp_path: Path, first: bytes
) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    assert await stranger(address(replica), first, bomb) == b""
    assert not (tmp_path / "exploded").exists()
    assert not replica.listener._calls


async def test_what_a_stranger_says_at_length_is_not_kept(replica: Replica) -> None:
    assert await stranger(address(replica), b"x" * 33) == b""


async def test_who_knows_the_secret_is_listened_to(replica: Replica, tmp_path: Path) -> None:
    """What the two tests above would say of a replica that listens to nobody."""
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))  # and is no call, so that it hangs up
    said = await stranger(address(replica), address(replica).ask, bomb)
    assert said[4:] == address(replica).answer
    assert (tmp_path / "exploded").exists()


async def test_who_says_nothing_is_hung_up_on(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_UNKNOWN_S", 0.1)
    assert await stranger(address(replica)) == b""


@pytest.mark.parametrize("knows", [True, False])
async def test_an_ingress_listens_only_to_the_replica_that_was_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, knows: bool
) -> None:
    """Somebody else may have been given a dead replica's port."""
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    answer = b"a" * 32

    def greet(frames: Frames, _: bytes) -> None:
        frames.send(answer if knows else b"b" * 32)
        frames.send(bomb)

    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Frames(greet, lambda _: None), HOST, 0)
    port = server.sockets[0].getsockname()[1]

    async def find(_: str) -> Address:
        return Address(HOST, port, b"q" * 32, answer)

    to = Lines(find)
    assert to.to("r1") is None
    exploded = (tmp_path / "exploded").exists
    await until(lambda: exploded() or caplog.text)
    assert exploded() == knows
    assert ("calls to r1 go through Serve" in caplog.text) != knows
    assert ("somebody else answers there" in caplog.text) != knows
    server.close()


async def test_calls_that_wait_are_lost_with_the_connection(replica: Replica, to: Lines) -> None:
    line = await opened(to)
    replica.gates["slow"] = asyncio.Event()
    slow = asyncio.create_task(say(line, "slow"))
    await say(line, "there")
    (frames,) = replica.listener._calls
    frames.close()
    with pytest.raises(ReplicaLost):
        await slow
    # Nobody would hear what this call takes.
    await until(lambda: replica.cancelled == ["slow"])
    again = await opened(to)
    assert again is not line
    assert await say(again, "back") == "BACK"


async def test_a_call_on_a_connection_that_has_ended_is_lost(replica: Replica, to: Lines) -> None:
    line = await opened(to)
    (frames,) = replica.listener._calls
    frames.close()
    await until(lambda: not line.is_open)
    async with asyncio.timeout(1):
        with pytest.raises(ReplicaLost):
            await say(line, "late")


async def test_a_call_that_fails_is_lost_and_logged(
    replica: Replica, to: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    line = await opened(to)
    with pytest.raises(ReplicaLost):
        await say(line, "raise")
    assert "nothing can be said" in caplog.text


async def test_nobody_waits_for_a_reply_whose_caller_has_gone(replica: Replica, to: Lines) -> None:
    line = await opened(to)
    replica.gates["slow"] = asyncio.Event()
    slow = asyncio.create_task(say(line, "slow"))
    await say(line, "there")
    slow.cancel()
    await asyncio.sleep(0)
    replica.gates["slow"].set()
    assert await say(line, "next") == "NEXT"
    assert not line._waiting


async def test_replicas_that_left_are_hung_up_on(replica: Replica, to: Lines) -> None:
    kept, left = await opened(to, "r1"), await opened(to, "r2")
    to.keep(["r1", "r3"])
    await until(lambda: len(replica.listener._calls) == 1)
    assert await say(kept, "still") == "STILL"
    with pytest.raises(ReplicaLost):
        await say(left, "gone")


@pytest.mark.parametrize("where", ["nowhere", "a closed port"])
async def test_a_replica_that_is_not_reached_is_tried_again_after_a_while(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(lines, "_AGAIN_S", 0.3)
    here = address(replica)
    asked: list[float] = []

    async def find(_: str) -> Address | None:
        asked.append(asyncio.get_running_loop().time())
        if len(asked) > 1:
            return here
        return None if where == "nowhere" else replace(here, port=1)

    to = Lines(find)
    line = await opened(to)
    assert await say(line, "late") == "LATE"
    assert len(asked) == 2
    assert asked[1] - asked[0] >= 0.3
    to.keep([])


async def test_one_that_does_not_answer_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lines, "_OPEN_S", 0.1)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Frames(lambda *_: None, lambda _: None), HOST, 0)

    async def find(_: str) -> Address:
        return Address(HOST, server.sockets[0].getsockname()[1], b"q" * 32, b"a" * 32)

    to = Lines(find)
    assert to.to("r1") is None
    await until(lambda: "TimeoutError" in caplog.text)
    assert to.to("r1") is None
    server.close()


async def test_a_replica_that_stops_waits_until_the_ingresses_have_hung_up(
    replica: Replica, to: Lines
) -> None:
    line, where = await opened(to), address(replica)
    stopping = asyncio.create_task(replica.listener.close())
    await asyncio.sleep(0.1)
    assert await say(line, "answered") == "ANSWERED"
    assert replica.listener.address is None
    with pytest.raises(ConnectionRefusedError):
        await stranger(where)
    assert not stopping.done()
    to.keep([])
    async with asyncio.timeout(1):
        await stopping


async def test_a_replica_that_stops_does_not_wait_for_ever(
    replica: Replica, to: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_HANG_UP_S", 0.1)
    line = await opened(to)
    replica.gates["slow"] = asyncio.Event()
    slow = asyncio.create_task(say(line, "slow"))
    await replica.listener.close()
    with pytest.raises(ReplicaLost):
        await slow


async def test_without_a_host_nobody_listens() -> None:
    alone = Listener(Replica().call)
    await alone.start(None)
    assert alone.address is None
    await alone.close()


async def test_a_host_that_is_not_this_machine_s_costs_no_replica(
    caplog: pytest.LogCaptureFixture,
) -> None:
    elsewhere = Listener(Replica().call)
    await elsewhere.start("192.0.2.1")
    assert elsewhere.address is None
    assert "but by Serve" in caplog.text
    await elsewhere.close()


@pytest.mark.parametrize("fault", ["raises", "hangs", "is cancelled"])
async def test_where_a_replica_is_not_found_it_is_said_once_and_tried_again_later(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    monkeypatch.setattr(lines, "_OPEN_S", 0.05)
    monkeypatch.setattr(lines, "_AGAIN_S", 0.1)
    asked = 0

    async def find(_: str) -> Address | None:
        nonlocal asked
        asked += 1
        if asked < 4:
            if fault == "hangs":
                await asyncio.Event().wait()
            raise asyncio.CancelledError if fault == "is cancelled" else ValueError("unforeseen")
        return address(replica)

    to = Lines(find)
    line = await opened(to)
    assert await say(line, "at last") == "AT LAST"
    assert asked == 4
    told = {"raises": "ValueError", "hangs": "TimeoutError"}
    assert caplog.text.count("go through Serve") == (fault in told)
    assert told.get(fault, "") in caplog.text
    to.keep([])


async def test_a_replica_that_left_is_not_looked_for_any_more() -> None:
    ended: list[str] = []

    async def find(_: str) -> Address | None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("find")
        return None

    to = Lines(find)
    to.to("r1")
    await asyncio.sleep(0)
    to.keep(["r2"])
    await until(lambda: ended)
    assert not to._lines


async def test_an_address_does_not_show_its_secrets(replica: Replica) -> None:
    here = address(replica)
    assert str(here.port) in repr(here)
    assert repr(here.ask) not in repr(here)
    assert repr(here.answer) not in repr(here)
