"""What do 10,000 adapters in the store cost? The start, and finding one of them.

The start is that of the application, `python -m deployments`, up to the first answer to
`GET /v1/tasks/{task}`; the other parts are in process, without Ray and HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from adapters.directory import Directory
from adapters.store import WEIGHTS
from benchmarks.bars import bars
from benchmarks.bases import ROOT, base_folder
from benchmarks.fleet import write_fleet
from benchmarks.record import table
from deployments.config import Args
from deployments.ingress.folders import Folders
from deployments.model.deployment import Model

COUNTS = (10, 1_000, 10_000)
FEW, ROUNDS, TOUCHED = 4, 3, 200
RANKS = (1, 2, 3, 4)


def measure() -> Iterator[dict[str, Any]]:
    """Stores of 10, 1,000 and 10,000 adapters, and the start with 4 and 10,000."""
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # else a line for each load
    with tempfile.TemporaryDirectory() as folder:
        base = base_folder("MiniLM", Path(folder))
        stores = {}
        for count in (FEW, *COUNTS):
            stores[count] = Path(folder) / f"store-{count}"
            write_fleet(stores[count], base, count, RANKS)
        for count in COUNTS:
            yield asyncio.run(lookups(base, stores[count], count))
        yield starts(base, stores[FEW], stores[max(COUNTS)])


def starts(base: str, few: Path, many: Path) -> dict[str, Any]:
    """Seconds from the command to the first answer, in turns."""
    taken: dict[str, list[float]] = {"few": [], "many": []}
    for _ in range(ROUNDS):
        for key, store in (("few", few), ("many", many)):
            taken[key].append(start_s(base, store))
    added = [m - f for f, m in zip(taken["few"], taken["many"], strict=True)]
    return {
        "part": "start",
        "adapters": max(COUNTS),
        "start_s": {key: statistics.median(runs) for key, runs in taken.items()},
        "added_s": statistics.median(added),
        "bytes": sum(path.stat().st_size for path in many.glob(f"*/{WEIGHTS}")),
    }


def start_s(base: str, store: Path) -> float:
    """Start the application, wait for its first answer, and stop it."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.close()
        application = {
            "name": "onebase",
            "route_prefix": "/",
            "import_path": "deployments.app:build",
            "args": {
                "base_model": base,
                "adapter_store": str(store),
                "quantization": "int8",
                "device": "cpu",
            },
        }
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": port},
            "applications": [application],
        }
        path = Path(folder) / "serve_config.yaml"
        path.write_text(yaml.safe_dump(config))
        started = time.perf_counter()
        server = subprocess.Popen(
            [sys.executable, "-m", "deployments", str(path)],
            cwd=ROOT,
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not answers(f"http://127.0.0.1:{port}/v1/tasks/task-00000"):
                if server.poll() is not None or time.perf_counter() - started > 120:
                    raise RuntimeError("the application did not start")
                time.sleep(0.05)
            return time.perf_counter() - started
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


async def lookups(base: str, store: Path, count: int) -> dict[str, Any]:
    """Milliseconds to find, read, validate and answer by tasks of a store, and to list them."""
    model = object.__new__(Model)
    started = time.perf_counter()
    await model.__init__(  # type: ignore[misc]
        Args(base_model=base, adapter_store=str(store), quantization="int8", device="cpu")
    )
    made_s = time.perf_counter() - started
    tasks = Folders(Directory(store), model.describe, settle_s=0.0)
    names = Directory(store).tasks()
    step = max(1, len(names) // TOUCHED)
    never, first, known = [], [], []
    for name in names[::step][:TOUCHED]:
        never.append(await milliseconds(lambda: tasks.get(name)))  # noqa: B023
        facts = await tasks.get(name)
        kind = facts["problem_type"]
        ask = (name, facts["version"], kind, [([101, 2307, 999, 102], None)])
        first.append(await milliseconds(lambda: model.predict(*ask)))  # noqa: B023
        known.append(await milliseconds(lambda: tasks.get(name)))  # noqa: B023
    listing = [await milliseconds(tasks.names) for _ in range(5)]
    return {
        "part": "lookup",
        "adapters": count,
        "model_made_s": made_s,
        "never_seen_ms": statistics.median(never),
        "first_predict_ms": statistics.median(first),
        "known_ms": statistics.median(known),
        "names_ms": statistics.median(listing),
    }


async def milliseconds(work: Callable[[], Awaitable[Any]]) -> float:
    started = time.perf_counter()
    await work()
    return 1e3 * (time.perf_counter() - started)


def as_table(found: Sequence[dict[str, Any]]) -> str:
    lookup = [one for one in found if one["part"] == "lookup"]
    [start] = [one for one in found if one["part"] == "start"]
    kinds = {
        "described, never seen": "never_seen_ms",
        "then its first answer": "first_predict_ms",
        "a known task looked at": "known_ms",
        "all names": "names_ms",
    }
    rows = [
        [what, *(f"{one[key]:.2f} ms" for one in lookup), "flat" if key != "names_ms" else ""]
        for what, key in kinds.items()
    ]
    seconds = start["start_s"]
    told = f"{seconds['many']:.1f} s, with {FEW} {seconds['few']:.1f} s"
    rows.append(["start", *([""] * (len(lookup) - 1)), told, f"≤ 5 s more: {start['added_s']:.1f}"])
    columns = ["", *(f"{one['adapters']:,} adapters" for one in lookup), "to reach"]
    return table(columns, rows)


def draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:
    axes = figure.subplots()
    of = [row for row in rows if row["part"] == "lookup"]
    kinds = {"described, never seen": "never_seen_ms", "its first answer": "first_predict_ms"}
    series = {what: [row[key] for row in of] for what, key in kinds.items()}
    bars(axes, [f"{row['adapters']:,} adapters" for row in of], series)
    axes.set_ylabel("ms")


def in_short(rows: Sequence[dict[str, Any]]) -> str:
    (start,) = (row for row in rows if row["part"] == "start")
    seconds = start["start_s"]
    return (
        f"With {start['adapters']:,} adapters in the store a start takes {seconds['many']:.1f} s, "
        f"with {FEW} {seconds['few']:.1f} s."
    )
