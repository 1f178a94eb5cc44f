"""What the replicas of a server have: memory, open files, threads, asyncio tasks."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import httpx2
import psutil

from benchmarks.load import HOST
from benchmarks.servers import started_from

_REPLICA = re.compile(r"ServeReplica:\w+:(\w+)")
_WRITTEN = re.compile(r"^Anonymous: +(\d+) kB$", re.MULTILINE)
_MAPPED = re.compile(r" (/.+)$", re.MULTILINE)
# Ray tells an event loop's tasks with all other metrics.
_LOOP_TASKS = re.compile(
    r'^ray_serve_event_loop_tasks\{.*deployment="(\w+)".*\} ([\d.]+)$', re.MULTILINE
)


class Use(NamedTuple):
    """What a replica has at a moment.

    Attributes:
        mib: What it has written itself: heap and stacks, and what it changed of files.
        files: Open files, sockets and the like, and files that it has mapped.
        threads: Threads.
        tasks: asyncio tasks of its event loop; 0 if that was not asked.
    """

    mib: float
    files: int
    threads: int
    tasks: int


def uses(home: Path, tasks: Mapping[str, int]) -> dict[str, Use]:
    """Return what each replica has, by deployment and pid: one that is replaced is another."""
    found = {}
    for pid in started_from(home):
        with contextlib.suppress(psutil.Error, OSError):  # it has ended meanwhile
            process = psutil.Process(pid)
            title = _REPLICA.search(" ".join(process.cmdline()))
            if title is not None:
                found[f"{title[1]} {pid}"] = Use(
                    _written_kib(pid) / 2**10,
                    process.num_fds() + len(set(_MAPPED.findall(_proc(pid, "maps")))),
                    process.num_threads(),
                    tasks.get(title[1], 0),
                )
    return found


async def loop_tasks(home: Path) -> dict[str, int]:
    """Return how many asyncio tasks the replicas of each deployment have, as Ray tells it.

    Raises:
        RuntimeError: Ray tells nothing of it.
    """
    (file,) = home.glob("ray/session_latest/metrics_export_port_*")
    async with httpx2.AsyncClient(timeout=20) as client:
        page = await client.get(f"http://{HOST}:{int(file.read_text())}/metrics")
    tasks: dict[str, int] = defaultdict(int)
    for deployment, count in _LOOP_TASKS.findall(page.text):
        tasks[deployment] += int(float(count))
    if not tasks:
        raise RuntimeError("Ray's page of metrics has no ray_serve_event_loop_tasks")
    return tasks


def _written_kib(pid: int) -> int:
    rollup = _proc(pid, "smaps_rollup")
    found = _WRITTEN.search(rollup)
    assert found is not None, rollup
    return int(found[1])


def _proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()
