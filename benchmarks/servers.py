"""Servers as processes of their own, which are gone when who asked for them is done, or fails."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.load import HOST
from benchmarks.record import ROOT
from deployments.model.allocator import CPU_MEMORY

START_S, STOP_S = 180.0, 20.0
FAST = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


def free_port() -> int:
    """A TCP port that nobody listens on, and that no client is given until it is used."""
    dice = random.SystemRandom()
    while True:
        port = dice.randrange(20_000, 30_000)  # under Serve's own and the kernel's for clients
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind((HOST, port))
            return port


@contextlib.contextmanager
def served(
    command: Sequence[str], port: int, probe: bytes, more: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """Run `python COMMAND` until the block ends; it begins when a request is answered with 200.

    Args:
        command: Arguments of Python; "{home}" in them is a folder of its own.
        port: Where it will listen.
        probe: The request.
        more: Environment variables.

    Yields:
        The folder, where its log is too.

    Raises:
        RuntimeError: It ended instead, or did not answer in time; with what it said.
    """
    # Short, since the paths of Ray's sockets below it must fit the system.
    home = Path(tempfile.mkdtemp(prefix="onebase-", dir="/tmp"))
    arguments = [part.replace("{home}", str(home)) for part in command]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that blocks are left
    process = None
    try:
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environment(home) | dict(more or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _wait(process, port, probe, home / "log")
        yield home
    finally:
        if process is not None:
            _stop(process, home)
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(home, ignore_errors=True)


def environment(home: Path) -> dict[str, str]:
    """Ports and paths of its own, so that a server that somebody runs here is not disturbed."""
    # What benchmarks are run with, for their own forwards, is not what a server is started with.
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in CPU_MEMORY
    }
    return inherited | {
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "RAY_TMPDIR": str(home),
        "RAY_USAGE_STATS_ENABLED": "0",
        **haproxy(home),
    }


def haproxy(home: Path) -> dict[str, str]:
    """Variables that give HAProxy ports and files that no other server here has."""
    return {
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(home / "h" / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(home / "h" / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(home / "h"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(home / "h" / "state"),
    }


def config(folder: Path, port: int, applications: Sequence[dict[str, Any]]) -> str:
    """Write what `python -m deployments` takes (JSON is YAML) and return its path."""
    path = folder / f"serve-{port}.yaml"
    options = {"host": HOST, "port": port}
    path.write_text(
        json.dumps(
            {
                "proxy_location": "HeadOnly",
                "http_options": options,
                "applications": list(applications),
            }
        )
    )
    return str(path)


def _wait(process: subprocess.Popen[bytes], port: int, probe: bytes, log: Path) -> None:
    until_s = time.monotonic() + START_S
    while not answers(port, probe):
        if process.poll() is not None or time.monotonic() > until_s:
            said = log.read_text(errors="replace")[-4000:]
            raise RuntimeError(f"{process.args!r} does not answer; it said:\n{said}")
        time.sleep(0.2)


def answers(port: int, request: bytes) -> bool:
    """Whether a request is answered with 200."""
    return answer(port, request) is not None


def answer(port: int, request: bytes) -> bytes | None:
    """The body that answers a request with 200, None if there is none."""
    try:
        with socket.create_connection((HOST, port), timeout=20) as connection:
            connection.sendall(request)
            response = http.client.HTTPResponse(connection)
            response.begin()
            body = response.read()
            return body if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None


def _stop(process: subprocess.Popen[bytes], home: Path) -> None:
    """End it as an operator does, and whatever it left behind the hard way."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    until_s = time.monotonic() + STOP_S
    while left := started_from(home):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > until_s:
            raise RuntimeError(f"processes {left} do not end")
        time.sleep(0.1)
    process.wait()


def started_from(home: Path) -> list[int]:
    """Pids of all processes that run below a server, known by its folder in their environment."""
    mark, found = str(home).encode(), []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile, or is somebody else's
            continue
    return found


def cpu_s(home: Path) -> dict[str, float]:
    """Seconds of a CPU that a server's processes have taken so far, by their titles."""
    taken: dict[str, float] = {}
    for pid in started_from(home):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            taken[title] = taken.get(title, 0.0) + seconds
    return taken
