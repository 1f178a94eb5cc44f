"""Messages over a connection, on both event loops that a replica may have."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from deployments.frames import Frames

MESSAGES = [b"", b"one", b"\0" * 70_000, b"last"]


class Transport(asyncio.Transport):
    """What is written, as a connection would carry it."""

    def __init__(self) -> None:
        self.written = b""
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def abort(self) -> None:
        self.aborted = True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        assert name == "socket"
        return self

    def setsockopt(self, *option: int) -> None:
        pass


def ended(_: Frames) -> None:
    pass


def connected(heard: Callable[[Frames, bytes], None], **given: Any) -> tuple[Frames, Transport]:
    frames, transport = Frames(heard, ended, **given), Transport()
    frames.connection_made(transport)
    return frames, transport


@given(st.lists(st.binary(max_size=40), max_size=8), st.data())
def test_messages_come_whole_wherever_the_bytes_are_cut(messages: list[bytes], data: Any) -> None:
    sender, wire = connected(lambda *_: None)
    for message in messages:
        sender.send(message)
    heard: list[bytes] = []
    receiver, _ = connected(lambda _, message: heard.append(message))
    rest = wire.written
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        receiver.data_received(rest[:cut])
        rest = rest[cut:]
    assert heard == messages


def test_a_message_that_is_too_long_ends_the_connection_before_it_is_there() -> None:
    sender, wire = connected(lambda *_: None)
    sender.send(b"short")
    sender.send(b"much too long")
    heard: list[bytes] = []
    receiver, transport = connected(lambda _, message: heard.append(message), max_bytes=5)
    receiver.data_received(wire.written[: -len(b"too long")])
    assert heard == [b"short"]
    assert transport.aborted


def test_nothing_is_sent_before_a_connection_or_after_it() -> None:
    frames = Frames(lambda *_: None, ended)
    frames.send(b"too early")
    frames.close()
    transport = Transport()
    frames.connection_made(transport)
    frames.connection_lost(None)
    frames.send(b"too late")
    assert not transport.written


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_end_is_told_to_both(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        heard: list[bytes] = []
        gone: list[str] = []
        all_gone = asyncio.Event()

        def end(who: str) -> None:
            gone.append(who)
            if len(gone) == 2:
                all_gone.set()

        def answer(frames: Frames, message: bytes) -> None:
            if message == b"raise":
                raise RuntimeError("this ends the connection")
            frames.send(message[::-1])

        server = await loop.create_server(
            lambda: Frames(answer, lambda _: end("server")), "127.0.0.1", 0
        )
        client = Frames(lambda _, message: heard.append(message), lambda _: end("client"))
        await loop.create_connection(lambda: client, *server.sockets[0].getsockname())
        assert client._transport is not None
        for option, least in (("SO_KEEPALIVE", 1), ("TCP_USER_TIMEOUT", 1000)):
            level = socket.SOL_SOCKET if option.startswith("SO") else socket.IPPROTO_TCP
            connection = client._transport.get_extra_info("socket")
            assert connection.getsockopt(level, getattr(socket, option)) >= least
        for message in MESSAGES:
            client.send(message)
        async with asyncio.timeout(5):
            while len(heard) < len(MESSAGES):
                await asyncio.sleep(0.01)
        assert heard == [message[::-1] for message in MESSAGES]
        told: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: told.append(context))
        client.send(b"raise")
        async with asyncio.timeout(5):
            await all_gone.wait()
        assert sorted(gone) == ["client", "server"]
        assert [str(context["exception"]) for context in told] == ["this ends the connection"]
        server.close()

    loop = new_loop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
