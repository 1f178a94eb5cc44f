"""What does an adapter cost that is in no slot? The cliff that others fall down past their slots.

1,024 adapters (MiniLM int8, q,v r=8) in host RAM, and 64 slots against a slot for each of them,
asked by many callers at once as an ingress asks; the first touch of an adapter on disk; and a task
in a slot while others are prefetched. In process, through `Model`, without Ray and HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from adapters.store import WEIGHTS
from benchmarks.bars import bars
from benchmarks.bases import ROOT, base_folder
from benchmarks.fleet import write_fleet
from benchmarks.record import table
from deployments.config import Args
from deployments.model.deployment import Model

RESIDENT, SLOTS, CALLERS = 1024, 64, 64
REQUESTS, ROUNDS = 1200, 3
TOUCHED, PREFETCHED = 200, 200
Request = tuple[str, list[int]]  # task, token ids


def measure() -> Iterator[dict[str, Any]]:
    """First touches, prefetches, and traffic over more adapters than slots."""
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # else a line for each load
    yield from asyncio.run(find())


async def find() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        base = base_folder("MiniLM", Path(folder))
        store = Path(folder) / "store"
        names = write_fleet(store, base, RESIDENT + TOUCHED + ROUNDS * PREFETCHED)
        ids = tokens(base)
        resident, touched = names[:RESIDENT], names[RESIDENT : RESIDENT + TOUCHED]
        few = await make(base, store, SLOTS)
        found = [{"part": "first touch", **await first_touch(few, store, touched, ids)}]
        cold = [
            names[start : start + PREFETCHED]
            for start in range(RESIDENT + TOUCHED, len(names), PREFETCHED)
        ]
        found.append({"part": "prefetch", **await beside_prefetch(few, resident[0], cold, ids)})
        found += await traffic(few, await make(base, store, RESIDENT), resident, ids)
    return found


async def make(base: str, store: Path, slots: int) -> Model:
    """The deployment's class as Serve would make it, without Serve."""
    model = object.__new__(Model)
    await model.__init__(  # type: ignore[misc]
        Args(
            base_model=base,
            adapter_store=str(store),
            quantization="int8",
            device="cpu",
            adapter_slots=slots,
            max_host_gib=2,
        )
    )
    return model


def tokens(base: str) -> list[list[int]]:
    """Real sentences, as the base reads them."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = [
        line
        for path in sorted((ROOT / "examples" / "data").glob("*.heldout.jsonl"))
        for line in path.read_text("utf-8").splitlines()
    ]
    random.Random(0).shuffle(lines)
    texts = [json.loads(line)["text"] for line in lines]
    encoded: list[list[int]] = tokenizer(texts, truncation=True, max_length=128)["input_ids"]
    return encoded


async def ask(model: Model, versions: dict[str, str], request: Request) -> None:
    """One text of one task."""
    task, ids = request
    kind = "single_label_classification"
    [scores] = await model.predict(task, versions[task], kind, [(ids, None)])
    assert not isinstance(scores, str), scores


async def traffic(
    few: Model, all_resident: Model, names: Sequence[str], ids: Sequence[list[int]]
) -> list[dict[str, Any]]:
    """Throughput with 64 slots and with a slot for each, in turns, by distribution of traffic."""
    versions = {}
    for model in (few, all_resident):
        for name in names:
            versions[name] = (await model.describe(name))["version"]
    found = []
    weights = {"uniform": [1.0] * len(names), "Zipf(1.0)": [1 / (1 + i) for i in range(len(names))]}
    for shape, of in weights.items():
        dice = random.Random(1)
        speeds: dict[str, list[float]] = {"few": [], "all": []}
        for turn in range(1 + ROUNDS):
            drawn = list(zip(dice.choices(names, of, k=REQUESTS), cycle(ids), strict=False))
            for key, model in (("few", few), ("all", all_resident)):
                if turn == 0:  # a first touch of every slot, and of memory
                    await run(model, versions, [(name, ids[0]) for name in names])
                taken_s = await run(model, versions, drawn)
                if turn:
                    speeds[key].append(REQUESTS / taken_s)
        shares = [f / a for f, a in zip(speeds["few"], speeds["all"], strict=True)]
        found.append(
            {
                "part": "traffic",
                "shape": shape,
                "adapters": len(names),
                "slots": SLOTS,
                "callers": CALLERS,
                "texts_per_s": {key: statistics.median(of) for key, of in speeds.items()},
                "of_all_resident": statistics.median(shares),
            }
        )
    return found


async def run(model: Model, versions: dict[str, str], requests: Sequence[Request]) -> float:
    """Seconds in which so many callers get all requests answered, each one at a time."""
    rest = iter(requests)

    async def caller(rest: Iterator[Request]) -> None:
        for request in rest:
            await ask(model, versions, request)

    started = time.perf_counter()
    await asyncio.gather(*(caller(rest) for _ in range(CALLERS)))
    return time.perf_counter() - started


async def first_touch(
    model: Model, store: Path, names: Sequence[str], ids: Sequence[list[int]]
) -> dict[str, Any]:
    """What the first answer of a task costs over its second, its files not in the page cache."""
    over = [await over_warm(model, store, *one) for one in zip(names, cycle(ids), strict=False)]
    return {"adapters": len(names), "over_warm_ms": percentiles(over)}


async def over_warm(model: Model, store: Path, name: str, row: list[int]) -> float:
    drop(store / name / WEIGHTS)
    versions: dict[str, str] = {}

    async def first() -> None:
        versions[name] = (await model.describe(name))["version"]
        await ask(model, versions, (name, row))

    cold_ms, _ = await timed(first)
    warm = [(await timed(lambda: ask(model, versions, (name, row))))[0] for _ in range(3)]
    return cold_ms - statistics.median(warm)


async def beside_prefetch(
    model: Model, warm: str, cold: Sequence[Sequence[str]], ids: Sequence[list[int]]
) -> dict[str, Any]:
    """A warm task's latency, one caller, while 200 others come into host RAM and while none do."""
    versions = {warm: (await model.describe(warm))["version"]}
    row = sorted(ids, key=len)[len(ids) // 2]  # of one length: it is not its spread that we ask for
    alone: list[float] = []
    beside: list[float] = []
    prefetch_s = []
    for names in cold:
        started = time.perf_counter()
        loads = asyncio.ensure_future(model.prefetch(names))
        count = 0
        while not loads.done():
            taken, _ = await timed(lambda: ask(model, versions, (warm, row)))
            beside.append(taken)
            count += 1
        await loads
        prefetch_s.append(time.perf_counter() - started)
        for _ in range(count):
            taken, _ = await timed(lambda: ask(model, versions, (warm, row)))
            alone.append(taken)
    shares = {p: percentiles(beside)[p] / percentiles(alone)[p] for p in ("p50", "p99")}
    return {
        "prefetched": len(cold[0]),
        "prefetch_s": statistics.median(prefetch_s),
        "requests": len(beside),
        "alone_ms": percentiles(alone),
        "beside_ms": percentiles(beside),
        "of_alone": shares,
    }


async def timed(work: Callable[[], Awaitable[Any]]) -> tuple[float, Any]:
    """Milliseconds, and what came of it."""
    started = time.perf_counter()
    result = await work()
    return 1e3 * (time.perf_counter() - started), result


def percentiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 95, 99)}


def drop(path: Path) -> None:
    """Ask the kernel to forget a file's pages, so that the next read is one from disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def as_table(found: Sequence[dict[str, Any]]) -> str:
    rows = []
    for one in found:
        if one["part"] == "traffic":
            speed = one["texts_per_s"]
            what = f"{one['shape']} over {one['adapters']} adapters, {one['slots']} slots"
            told = f"{speed['few']:.0f} of {speed['all']:.0f} texts/s"
            rows.append([what, told, f"{one['of_all_resident']:.2f}", "≥ 0.85"])
        elif one["part"] == "first touch":
            over = one["over_warm_ms"]
            told = f"p50 {over['p50']:.1f} ms, p95 {over['p95']:.1f} ms over warm"
            rows.append(["first touch from disk, idle", told, f"{over['p95']:.1f} ms", "≤ 25 ms"])
        else:
            told = f"p99 {one['beside_ms']['p99']:.1f} ms, alone {one['alone_ms']['p99']:.1f} ms"
            what = f"warm task while {one['prefetched']} are prefetched"
            rows.append([what, told, f"{one['of_alone']['p99']:.2f}", "≤ 1.3"])
    return table(["", "measured", "ratio", "to reach"], rows)


def draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:
    axes = figure.subplots()
    of = [row for row in rows if row["part"] == "traffic"]
    series = {
        f"{SLOTS} slots": [row["texts_per_s"]["few"] for row in of],
        f"a slot for each of {RESIDENT:,}": [row["texts_per_s"]["all"] for row in of],
    }
    bars(axes, [row["shape"] for row in of], series)
    axes.set_ylabel("texts/s")


def in_short(rows: Sequence[dict[str, Any]]) -> str:
    shares = {row["shape"]: row["of_all_resident"] for row in rows if row["part"] == "traffic"}
    (touch,) = (row["over_warm_ms"]["p95"] for row in rows if row["part"] == "first touch")
    told = ", ".join(f"{share:.0%} ({shape})" for shape, share in shares.items())
    return (
        f"{RESIDENT:,} adapters in host RAM over {SLOTS} slots: {told} of the throughput with all "
        f"of them in slots. The first touch of an adapter on disk takes {touch:.0f} ms more (p95)."
    )
