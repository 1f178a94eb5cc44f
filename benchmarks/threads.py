"""How many threads should a forward have? All of the CPUs, or one less for the event loops.

The whole application under Ray Serve, asked by handle: single texts by one caller while two others
send 32 texts at a time, and single texts by 64 callers. Not one of the issue's questions: it is
what docs/adr/0005 rests on, and takes minutes, since every setting is a start of the application.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray import serve

from benchmarks.bars import bars
from benchmarks.bases import ROOT
from benchmarks.record import table
from deployments.app import build
from deployments.config import Args

ROUNDS, LOADED_S, CALLERS, REQUESTS = 2, 10.0, 64, 1500


def measure() -> Iterator[dict[str, Any]]:
    """The application with one thread less than CPUs and with all, in turns."""
    cpus = len(os.sched_getaffinity(0))
    taken: dict[int, list[dict[str, float]]] = {max(1, cpus - 1): [], cpus: []}
    ray.init(num_cpus=4 * cpus, log_to_driver=False)
    asyncio.run(measure_all(taken))
    ray.shutdown()
    for threads, runs in taken.items():
        yield {"threads": threads, "runs": runs} | medians(runs)


def as_table(found: Sequence[dict[str, Any]]) -> str:
    columns = ["threads", "alone p50", "loaded p50", "loaded p99", "bulk texts/s", "64 callers"]
    rows = [
        [
            str(one["threads"]),
            *(f"{one[key]:.1f} ms" for key in ("alone_p50", "loaded_p50", "loaded_p99")),
            *(f"{one[key]:.0f} texts/s" for key in ("bulk_per_s", "singles_per_s")),
        ]
        for one in found
    ]
    return table(columns, rows)


def draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:
    axes = figure.subplots()
    series = {"bulk": "bulk_per_s", "64 callers": "singles_per_s"}
    groups = [f"{row['threads']} threads" for row in rows]
    bars(axes, groups, {name: [row[key] for row in rows] for name, key in series.items()})
    axes.set_ylabel("texts/s")


def in_short(rows: Sequence[dict[str, Any]]) -> str:
    return ""


async def measure_all(taken: dict[int, list[dict[str, float]]]) -> None:
    """In one event loop: in throughput mode Serve's router lives in its caller's."""
    for _ in range(ROUNDS):
        for threads, runs in taken.items():
            runs.append(await of_setting(threads))
            print(threads, runs[-1], file=sys.stderr, flush=True)
    serve.shutdown()


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


async def of_setting(threads: int) -> dict[str, float]:
    args = Args(
        base_model=str(ROOT / "examples" / "base"),
        adapter_store=str(ROOT / "examples" / "store"),
        quantization="int8",
        device="cpu",
        num_cpus=threads,
    )
    name = f"threads-{time.monotonic_ns()}"
    handle = await asyncio.to_thread(serve.run, build(args), name=name, route_prefix=None)
    result = await ask(handle)
    await asyncio.to_thread(serve.delete, name)
    return result


async def ask(handle: Any) -> dict[str, float]:
    texts = sentences()
    tasks = ("sentiment", "topic", "spam", "aspects")

    async def one(index: int) -> float:
        started = time.perf_counter()
        await handle.predict.remote(tasks[index % 4], texts[index % len(texts)])
        return 1e3 * (time.perf_counter() - started)

    for index in range(40):
        await one(index)
    alone = [await one(index) for index in range(200)]
    ending, sent = time.perf_counter() + LOADED_S, 0

    async def bulk(index: int) -> None:
        nonlocal sent
        while time.perf_counter() < ending:
            start = random.Random(sent).randrange(len(texts) - 32)
            await handle.predict.remote(tasks[index], texts[start : start + 32])
            sent += 32

    bulks = [asyncio.ensure_future(bulk(index)) for index in range(2)]
    loaded: list[float] = []
    while time.perf_counter() < ending:
        loaded.append(await one(len(loaded)))
    await asyncio.gather(*bulks)
    turns = iter(range(REQUESTS))

    async def caller() -> None:
        for index in turns:
            await one(index)

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    singles = REQUESTS / (time.perf_counter() - started)
    return {
        "alone_p50": statistics.median(alone),
        "loaded_p50": statistics.median(loaded),
        "loaded_p99": sorted(loaded)[len(loaded) * 99 // 100],
        "bulk_per_s": sent / LOADED_S,
        "singles_per_s": singles,
    }


def sentences() -> list[str]:
    """The examples' held-out texts, shuffled."""
    lines = [
        line
        for path in sorted((ROOT / "examples" / "data").glob("*.heldout.jsonl"))
        for line in path.read_text("utf-8").splitlines()
    ]
    random.Random(0).shuffle(lines)
    return [json.loads(line)["text"] for line in lines]
