"""What does a task that floods cost another one?

Over HTTP, MiniLM in fp32 and int8, HAProxy and throughput mode, as configured by default. One
caller asks a task for one text at a time: alone; beside another task that is asked from 256
connections at once; and beside one that is asked at random moments, twice as often as it can be
answered, by callers who ask again when Retry-After says so. The caller should wait for no more than
the micro-batch that runs when his request comes, and three times what he waits alone. Then the
first flood again, with a high priority and a latency target in the rules of the caller's task; and
what memory ingress and model take more while the second flood runs. And what the flood itself gets,
which leaves batches short for the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil

from benchmarks import traffic
from benchmarks.bars import bars
from benchmarks.load import HOST, Load, closed, opened, run
from benchmarks.record import table
from benchmarks.servers import FAST, answer, answers, free_port, served, started_from
from benchmarks.systems import command_of_ours

ROUNDS, WARM_S, LOAD_S = 2, 5.0, 8.0
CONNECTIONS, TIMES = 256, 2.0
# Before the open flood counts: until so many rows wait that more are refused.
LEAD_S, MOST_CONNECTIONS = 6.0, 12_000
BATCH = 48  # sentences that a micro-batch of 1,024 tokens holds
URGENT = {"priority": "high", "latency_target_ms": 60}
PACKAGES = ("ray",)


def measure() -> Iterator[dict[str, Any]]:
    """Both quantizations."""
    for quantization in ("none", "int8"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            traffic.write_stores(folder)
            yield {"quantization": quantization, **of_server(folder, quantization)}


def of_server(folder: Path, quantization: str) -> dict[str, Any]:
    """Start it, and load it in all ways in turns."""
    port = free_port()
    texts = traffic.texts_of("sentiment")
    lone = cycle([traffic.of_ours("spam", [text]) for text in traffic.texts_of("spam")])
    flood = cycle([traffic.of_ours("sentiment", [text]) for text in texts])
    with served(command_of_ours(folder, port, quantization), port, next(lone), FAST) as home:
        assert answers(port, next(flood))
        capacity = run(closed(port, flood, CONNECTIONS, WARM_S)).per_s
        batch_ms = micro_batch_ms(port, texts)
        runs: dict[str, list[Load]] = {"alone": [], "closed": [], "urgent": [], "open": []}
        floods: dict[str, list[float]] = {"closed": [], "urgent": []}
        refused, grew_mib = 0, []
        for _ in range(ROUNDS):
            runs["alone"].append(run(closed(port, lone, 1, LOAD_S)))
            for name, rules in (("closed", dict.fromkeys(URGENT)), ("urgent", URGENT)):
                patch(port, "spam", rules)
                by_all = closed(port, flood, CONNECTIONS, LOAD_S + 2.0)
                beside, by = run(_beside(port, lone, 1.0, by_all))
                runs[name].append(beside)
                floods[name].append(by.per_s)
            patch(port, "spam", dict.fromkeys(URGENT))
            before_mib = mib(home)
            rate, seconds = TIMES * capacity, LEAD_S + LOAD_S + 1.0
            beside, by = run(
                _beside(
                    port, lone, LEAD_S, opened(port, flood, rate, seconds, MOST_CONNECTIONS, True)
                )
            )
            runs["open"].append(beside)
            refused += by.refused
            grew_mib.append(mib(home) - before_mib)
            settle(port, flood)
    return {
        "capacity": capacity,
        "floods_per_s": {name: statistics.median(told) for name, told in floods.items()},
        "micro_batch_ms": batch_ms,
        "refused": refused,
        "grew_mib": max(grew_mib),
        "runs": {name: [load.told() for load in loads] for name, loads in runs.items()},
    }


async def _beside(port: int, lone: Iterator[bytes], lead_s: float, flood: Any) -> tuple[Load, Load]:
    """The caller, from some time after the flood began until shortly before it ends."""
    flooding = asyncio.create_task(flood)
    await asyncio.sleep(lead_s)
    found = await closed(port, lone, 1, LOAD_S)
    return found, await flooding


def micro_batch_ms(port: int, texts: Sequence[str]) -> float:
    """What the model takes for as many rows of the flood as a micro-batch has, alone."""
    taken = []
    asked = cycle(texts)
    for _ in range(10):
        told = answer(port, traffic.of_ours("sentiment", [*islice(asked, BATCH)]))
        taken.append(json.loads(told or "")["timings_ms"]["model"])
    return statistics.median(taken)


def settle(port: int, requests: Iterator[bytes]) -> None:
    """Wait until what the flood left behind is worked off."""
    while not answers(port, next(requests)):
        pass


def patch(port: int, task: str, rules: dict[str, Any]) -> None:
    """Lay rules over a task's own; null takes one back."""
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    headers = {"content-type": "application/json"}
    body = json.dumps({"rules": rules})
    connection.request("PATCH", f"/v1/tasks/{task}", body, headers)
    response = connection.getresponse()
    said = response.read()
    connection.close()
    if response.status != 200:
        raise RuntimeError(said.decode())


def mib(home: Path) -> float:
    """What ingress and model take, and nobody shares, in MiB."""
    taken = 0
    for pid in started_from(home):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            process = psutil.Process(pid)
            if any(of in " ".join(process.cmdline()) for of in (":Ingress", ":Model")):
                taken += process.memory_full_info().uss
    return float(taken) / 2**20


def p95_ms(row: dict[str, Any], load: str) -> float:
    return statistics.median(one["p95_ms"] for one in row["runs"][load])


def bound_ms(row: dict[str, Any]) -> float:
    """One micro-batch, and three times what is waited alone."""
    return float(row["micro_batch_ms"]) + 3 * p95_ms(row, "alone")


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    columns = ["", "one micro-batch", "p95 alone", "one micro-batch and 3x that"]
    columns += [f"p95 beside {CONNECTIONS} connections", f"p95 beside {TIMES:.0f}x what it can do"]
    columns += ["the former with priority", "failed", "told to come again", "memory"]
    columns += ["the first flood alone", "beside the caller", "beside him with priority"]
    return table(
        columns,
        [
            [
                "fp32" if row["quantization"] == "none" else row["quantization"],
                f"{row['micro_batch_ms']:.0f} ms",
                f"{p95_ms(row, 'alone'):.0f} ms",
                f"{bound_ms(row):.0f} ms",
                f"{p95_ms(row, 'closed'):.0f} ms",
                f"{p95_ms(row, 'open'):.0f} ms",
                f"{p95_ms(row, 'urgent'):.0f} ms",
                f"{sum(one['failed'] for loads in row['runs'].values() for one in loads):.0f}",
                f"{row['refused']:,}",
                f"{row['grew_mib']:+.0f} MiB",
                f"{row['capacity']:.0f}/s",
                f"{row['floods_per_s']['closed']:.0f}/s",
                f"{row['floods_per_s']['urgent']:.0f}/s",
            ]
            for row in rows
        ],
    )


def draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:
    axes = figure.subplots()
    names = {
        "alone": "alone",
        "closed": f"beside {CONNECTIONS} connections",
        "urgent": "the same with priority",
        "open": f"beside {TIMES:.0f}x what it can do",
    }
    groups = ["fp32" if row["quantization"] == "none" else row["quantization"] for row in rows]
    series = {label: [p95_ms(row, name) for row in rows] for name, label in names.items()}
    bars(axes, groups, series | {"one micro-batch and 3x alone": [bound_ms(row) for row in rows]})
    axes.set_ylabel("p95 of a caller's single texts, ms")


def in_short(rows: Sequence[dict[str, Any]]) -> str:
    row = rows[0]
    return (
        f"One caller's p95 is {p95_ms(row, 'alone'):.0f} ms alone, {p95_ms(row, 'closed'):.0f} ms "
        f"beside another task's {CONNECTIONS} connections and {p95_ms(row, 'open'):.0f} ms beside "
        f"{TIMES:.0f} times the requests that can be answered (one micro-batch takes "
        f"{row['micro_batch_ms']:.0f} ms)."
    )
