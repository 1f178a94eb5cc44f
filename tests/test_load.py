"""The load generator counts what was answered, and charges a stall to all who came meanwhile."""

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.bisection import highest
from benchmarks.load import HOST, Load, closed, opened, post, run
from benchmarks.record import ROOT
from benchmarks.servers import answers, cpu_s, free_port, served, started_from

REQUEST = post("/predict", b'{"texts": ["x"]}')
TRIVIAL = ["-m", "benchmarks.peers.trivial"]


class Server:
    """Answers after `delay_s`, to `answer` to every `nth` request, one at a time."""

    def __init__(self, answer: bytes, delay_s: float = 0.0, stall: tuple[int, float] = (0, 0.0)):
        self._answer, self._delay_s, self._stall = answer, delay_s, stall
        self._turn = asyncio.Lock()
        self.bodies: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                async with self._turn:
                    self.bodies.append(await reader.readexactly(length))
                    stalls = len(self.bodies) == self._stall[0]
                    await asyncio.sleep(self._stall[1] if stalls else self._delay_s)
                for at in range(0, len(self._answer), 20):  # in pieces, as from a network
                    writer.write(self._answer[at : at + 20])
                    await writer.drain()
                if not self._answer or self._answer is LAST:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
LAST = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello"
LATER = b"HTTP/1.1 429 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
BUSY = b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n"


def under(server: Server, load) -> Load:
    """What comes of a load on a server in the same event loop."""

    async def both() -> Load:
        listening = await asyncio.start_server(server.serve, HOST, port := free_port())
        try:
            return await load(port)
        finally:
            listening.close()

    return run(both())


@pytest.mark.parametrize("answer", [OK, CHUNKED], ids=["length", "chunked"])
def test_a_closed_loop_counts_what_was_answered_in_time(answer: bytes) -> None:
    server = Server(answer, delay_s=0.02)
    load = under(server, lambda port: closed(port, itertools.repeat(REQUEST), 4, 1.0))
    assert set(server.bodies) == {b'{"texts": ["x"]}'}
    # What was on its way at the end is not counted.
    assert len(server.bodies) - 4 <= len(load.latencies_ms) < len(server.bodies)
    assert load.failed == 0
    # One at a time: with four connections each waits for the other three.
    assert 4 * 20 <= load.percentile(50) < 4 * 40
    assert load.per_s == len(load.latencies_ms) == pytest.approx(1 / 0.02, rel=0.5)


def test_what_is_refused_or_cut_off_is_no_answer() -> None:
    load = under(Server(BUSY), lambda port: closed(port, itertools.repeat(REQUEST), 2, 0.2))
    assert load.failed > 10
    assert load.per_s == 0
    load = under(Server(b""), lambda port: closed(port, itertools.repeat(REQUEST), 2, 0.2))
    assert (load.failed, load.per_s) == (2, 0)
    load = under(Server(b""), lambda port: opened(port, itertools.repeat(REQUEST), 50, 0.4))
    assert load.failed > 5
    assert not load.latencies_ms


def test_after_an_answer_that_is_a_connection_s_last_there_is_another_connection() -> None:
    server = Server(LAST, delay_s=0.005)
    load = under(server, lambda port: closed(port, itertools.repeat(REQUEST), 2, 0.5))
    assert load.failed == 0
    assert len(load.latencies_ms) > 20
    load = under(Server(LAST), lambda port: opened(port, itertools.repeat(REQUEST), 100, 0.5))
    assert load.failed == 0
    assert len(load.latencies_ms) == pytest.approx(50, rel=0.5)


def test_who_heeds_retry_after_asks_again_when_he_is_told_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.load._GRACE_S", 0.1)

    def load(port: int, heed: bool):
        return opened(port, itertools.repeat(REQUEST), 20, 2.5, 256, heed)

    rude, polite = Server(LATER), Server(LATER)
    loads = [
        under(rude, lambda port: load(port, False)),
        under(polite, lambda port: load(port, True)),
    ]
    assert [one.refused for one in loads] == [0, len(polite.bodies)]
    assert loads[0].failed == len(rude.bodies) == pytest.approx(50, rel=0.4)
    # Those of the first 1.5 s have come once more, those of the first 0.5 s twice.
    assert len(polite.bodies) == pytest.approx(50 + 30 + 10, rel=0.4)
    assert loads[1].failed == loads[0].failed  # never answered


def test_an_open_loop_charges_a_stall_to_all_who_came_meanwhile() -> None:
    stalling = Server(OK, stall=(20, 0.5))
    load = under(stalling, lambda port: opened(port, itertools.repeat(REQUEST), 200, 1.5))
    assert load.failed == 0
    assert len(load.latencies_ms) == len(stalling.bodies) == pytest.approx(300, rel=0.2)
    # 200 a second came in the 0.4 s whose requests waited for over 100 ms; a client that waits for
    # each answer before it sends the next would have seen one.
    late = sum(latency > 100 for latency in load.latencies_ms)
    assert 50 <= late <= 130
    assert load.percentile(50) < 100


def test_what_an_open_loop_never_hears_of_counts_as_old_as_it_is() -> None:
    stuck = Server(OK, stall=(1, 60.0))
    load = under(stuck, lambda port: opened(port, itertools.repeat(REQUEST), 100, 0.3))
    assert load.failed == len(load.latencies_ms) > 10
    assert min(load.latencies_ms) > 1900


def test_the_same_requests_come_at_the_same_moments_every_time() -> None:
    counts = set()
    for _ in range(2):
        server = Server(OK)
        under(server, lambda port: opened(port, itertools.repeat(REQUEST), 100, 0.5))
        counts.add(len(server.bodies))
    assert len(counts) == 1


@pytest.mark.parametrize(("limit", "near"), [(70.0, 100.0), (118.0, 100.0), (300.0, 100.0)])
def test_the_highest_load_is_found_to_a_fiftieth(limit: float, near: float) -> None:
    tried: list[float] = []

    def holds(load: float) -> bool:
        tried.append(load)
        return load <= limit

    found = highest(holds, near)
    assert found <= limit
    assert min(limit, 1.2 * near) - found <= 0.025 * near
    assert len(tried) <= 8


def test_where_little_is_held_it_is_looked_for_below() -> None:
    assert highest(lambda _: False, 100.0) == 0
    assert highest(lambda load: load <= 10, 100.0) == pytest.approx(10, abs=0.8)


def test_a_server_is_gone_with_all_it_started_also_on_failure() -> None:
    port = free_port()
    homes: list[Path] = []
    child = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time;"
        " time.sleep(600)'], start_new_session=True); from benchmarks.peers import trivial;"
        f" import asyncio; asyncio.run(trivial.serve({port}))"
    )

    def fails() -> None:
        with served(["-c", child], port, REQUEST) as home:
            homes.append(home)
            assert len(started_from(home)) == 2
            assert answers(port, REQUEST)
            assert sum(cpu_s(home).values()) > 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not started_from(homes[0])
    assert not homes[0].exists()
    assert not answers(port, REQUEST)


def test_a_server_that_does_not_start_says_why() -> None:
    with (
        pytest.raises(RuntimeError, match="no such base"),
        served(["-c", "raise SystemExit('no such base')"], free_port(), REQUEST),
    ):
        pytest.fail("it did not start")


def test_a_signal_to_the_benchmark_ends_its_servers_too(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from benchmarks.load import post\n"
        "from benchmarks.servers import served\n"
        f"with served({TRIVIAL!r} + [sys.argv[1]], int(sys.argv[1]), post('/', b'')) as home:\n"
        "    print(home, flush=True); time.sleep(60)\n"
    )
    benchmark = subprocess.Popen(
        [sys.executable, "-c", script, str(free_port())],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert benchmark.stdout is not None
    home = Path(benchmark.stdout.readline().strip())
    assert started_from(home)
    os.kill(benchmark.pid, signal.SIGTERM)
    assert benchmark.wait(30) == 143
    benchmark.stdout.close()
    until_s = time.monotonic() + 5
    while started_from(home) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert not started_from(home)
    assert not home.exists()
