"""HTTP load that costs little: prepared bytes over keep-alive sockets, closed and open loop.

Closed: every connection sends its next request when it has its answer. Open: requests come as a
Poisson process whatever the answers do, and a latency counts from when its request was meant to be
sent, so a server that stalls is charged for all who would have come meanwhile.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvloop

HOST = "127.0.0.1"
_MOST_CONNECTIONS = 256
# How long the last answers are waited for.
_GRACE_S = 2.0

T = TypeVar("T")


@dataclass
class Load:
    """What came of a load.

    Attributes:
        seconds: How long it was given.
        latencies_ms: Of every request that was answered with 200; in an open loop also, as old as
            they were at the end, of those that were never answered.
        failed: Answers that were not 200, and in an open loop what was never answered.
        refused: Of an open loop whose callers heed Retry-After, how often one was told to.
        cpu_s: What making the load took of a CPU.
    """

    seconds: float
    latencies_ms: list[float] = field(default_factory=list)
    failed: int = 0
    refused: int = 0
    cpu_s: float = 0.0

    @property
    def per_s(self) -> float:
        """Requests a second that were answered with 200."""
        return len(self.latencies_ms) / self.seconds

    def percentile(self, percent: float) -> float:
        """The latency, in ms, that so many percent of the requests did not exceed."""
        if not self.latencies_ms:
            return math.inf
        ordered = sorted(self.latencies_ms)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]

    def told(self) -> dict[str, float]:
        """What is recorded of it."""
        percentiles = {f"p{p}_ms": self.percentile(p) for p in (50, 95, 99)}
        cpu = self.cpu_s / self.seconds
        return {"per_s": self.per_s, "failed": self.failed, "generator_cpu": cpu, **percentiles}


def post(path: str, body: bytes, headers: str = "") -> bytes:
    """Return a request as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\n{headers}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


class Connection(asyncio.Protocol):
    """A keep-alive connection with one request at a time.

    An answer with `connection: close` is followed by a new connection: HAProxy sends it when it is
    loaded anew, which Ray Serve has it do when a replica comes or goes.
    """

    def __init__(self, port: int, answered: Callable[[Connection, int], None]) -> None:
        """Take who hears of an answer's status, 0 if the connection was lost instead."""
        self._port = port
        self._answered = answered
        self._buffer = b""
        self._transport: Any = None
        self._opening: asyncio.Task[Any] | None = None
        self._request = b""  # to be sent when it is open
        self._num_closed = 0  # by this side, and not heard of yet
        self.due_s: float | None = None  # when its request was to be sent; None without one
        self.retry_after_s: float | None = None  # as the last answer told

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        if self._request:
            self._transport.write(self._request)
            self._request = b""

    def send(self, request: bytes, due_s: float) -> None:
        self.due_s = due_s
        if self._transport is not None:
            self._transport.write(request)
            return
        self._request = request
        self._opening = asyncio.get_running_loop().create_task(self.open())

    async def open(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: self, HOST, self._port)
        except OSError as error:
            self.connection_lost(error)

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        if _is_whole(self._buffer):
            answer, self._buffer = self._buffer, b""
            if _is_last(answer):
                self._num_closed += 1
                self._transport.close()
                self._transport = None
            self.retry_after_s = _retry_after_s(answer)
            self._answered(self, int(answer[9:12]))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._num_closed:
            self._num_closed -= 1
        elif self.due_s is not None:
            self._answered(self, 0)

    def close(self) -> None:
        self.due_s = None
        if self._opening is not None:
            self._opening.cancel()
        if self._transport is not None:
            self._transport.abort()


def _is_whole(answer: bytes) -> bool:
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return False
    head = answer[:end].lower()
    at = head.find(b"\r\ncontent-length:")
    if at < 0:
        return b"chunked" in head and answer.endswith(b"\r\n0\r\n\r\n")
    length = int(head[at + 17 :].split(b"\r\n", 1)[0])
    return len(answer) >= end + 4 + length


def _is_last(answer: bytes) -> bool:
    """Whether an answer says that no other one comes over its connection."""
    return b"\r\nconnection: close\r\n" in answer[: answer.find(b"\r\n\r\n") + 2].lower()


def _retry_after_s(answer: bytes) -> float | None:
    if not answer.startswith((b"429", b"503"), 9):
        return None
    _, found, rest = answer.lower().partition(b"\r\nretry-after:")
    return float(rest[: rest.index(b"\r\n")]) if found else None


async def closed(port: int, requests: Iterator[bytes], connections: int, seconds: float) -> Load:
    """Send from so many connections for so long; what is still on its way then does not count."""
    load, clock = Load(seconds), time.perf_counter
    left, ended = connections, asyncio.get_running_loop().create_future()
    ends_s = clock() + seconds

    def answered(connection: Connection, status: int) -> None:
        nonlocal left
        now_s, due_s = clock(), connection.due_s
        connection.due_s = None
        if now_s < ends_s and due_s is not None:
            if status == 200:
                load.latencies_ms.append(1e3 * (now_s - due_s))
            else:
                load.failed += 1
            if status:
                connection.send(next(requests), clock())
                return
        left -= 1
        if not left:
            ended.set_result(None)

    opened_ = [await _connect(port, answered) for _ in range(connections)]
    started_s, cpu_s = clock(), time.process_time()
    ends_s = started_s + seconds
    for connection in opened_:
        connection.send(next(requests), clock())
    try:
        await ended
    finally:
        for connection in opened_:
            connection.close()
    load.cpu_s = time.process_time() - cpu_s
    return load


async def opened(
    port: int,
    requests: Iterator[bytes],
    rate: float,
    seconds: float,
    most_connections: int = _MOST_CONNECTIONS,
    heed: bool = False,
) -> Load:
    """Send at a mean rate a second for so long, at random moments, the same ones every time.

    Who finds no connection free waits for one, and his latency runs. Callers who heed Retry-After
    ask again when they are told to, which is no failure; to have no answer by the end is one.
    """
    load, clock = Load(seconds), time.perf_counter
    idle: list[Connection] = []
    waiting: deque[float] = deque()  # for a connection
    later: set[float] = set()  # told to come again
    connections: list[Connection] = []

    def answered(connection: Connection, status: int) -> None:
        due_s, connection.due_s = connection.due_s, None
        wait_s = connection.retry_after_s
        if heed and status and wait_s is not None and due_s is not None:
            load.refused += 1
            later.add(due_s)
            asyncio.get_running_loop().call_later(wait_s, again, due_s)
        elif status == 200 and due_s is not None:
            load.latencies_ms.append(1e3 * (clock() - due_s))
        else:
            load.failed += 1
        if not status:
            return
        if waiting:
            connection.send(next(requests), waiting.popleft())
        else:
            idle.append(connection)

    def again(due_s: float) -> None:
        if due_s in later:  # and the load has not ended meanwhile
            later.remove(due_s)
            send(due_s)

    def send(due_s: float) -> None:
        if idle:
            idle.pop().send(next(requests), due_s)
        elif len(connections) < most_connections:
            connections.append(Connection(port, answered))
            connections[-1].send(next(requests), due_s)
        else:
            waiting.append(due_s)

    dice = random.Random(0)
    connections += [await _connect(port, answered) for _ in range(_MOST_CONNECTIONS)]
    idle += connections
    cpu_s, due_s = time.process_time(), clock()
    ends_s = due_s + seconds
    while (due_s := due_s + dice.expovariate(rate)) < ends_s:
        if (wait_s := due_s - clock()) > 0:
            await asyncio.sleep(wait_s)
        send(min(due_s, clock()))  # uvloop may wake up to a millisecond early
    until_s = clock() + _GRACE_S
    while (waiting or later or any(c.due_s is not None for c in connections)) and clock() < until_s:
        await asyncio.sleep(0.02)
    load.cpu_s = time.process_time() - cpu_s
    never = [*waiting, *later, *(c.due_s for c in connections if c.due_s is not None)]
    later.clear()
    load.failed += len(never)
    load.latencies_ms += [1e3 * (clock() - due_s) for due_s in never]
    for connection in connections:
        connection.close()
    return load


async def _connect(port: int, answered: Callable[[Connection, int], None]) -> Connection:
    connection = Connection(port, answered)
    await connection.open()
    return connection


def run(load: Coroutine[Any, Any, T]) -> T:
    """Run a load to its end."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(load)
