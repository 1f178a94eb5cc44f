"""What does a request take, over HTTP, of many tasks at a time?

On all cores, load generator included: one text a request, five tasks mixed, real sentences, MiniLM.
The inference guide's FastAPI server, Ray's idiom (`@serve.multiplexed` and `@serve.batch`) as Ray
ships and with HAProxy and throughput mode, and ours with these two, in turns, each alone on the
machine; base and adapters in fp32, and ours in int8 beside it. Closed loop: 32 connections, and
one. Open loop: Poisson arrivals, latency from the moment a request was meant to be sent, and the
highest rate whose p95 is at most 100 ms, by bisection, nothing refused. A no-op forward: the
application with a forward that answers zeros, against the same whose ingress answers them itself,
without the call to the model. 64 adapters: requests that name them in turn, against requests that
all name one of them. Beside bulk: single-text requests at 32 connections while another connection
sends 512 texts at a time. Fan-out: one text for ten tasks, in one request and in ten, one after
another; and the highest rate of the former whose p95 is at most 100 ms.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks import traffic
from benchmarks.bisection import highest
from benchmarks.fleet import write_fleet
from benchmarks.load import Load, closed, opened, post, run
from benchmarks.servers import FAST, answer, answers, config, cpu_s, free_port, served
from benchmarks.serving_told import (
    ADAPTERS,
    BULK,
    CONNECTIONS,
    FANNED,
    MAX_P95_MS,
    as_table,
    draw,
    in_short,
)
from benchmarks.systems import BASE, System, application, command_of_ours, systems

__all__ = ["PACKAGES", "as_table", "draw", "in_short", "measure"]

PACKAGES = ("ray", "fastapi", "uvicorn")
ROUNDS = 2
TURNS, BULK_TURNS = 5, 3  # of what is compared within one server
WARM_S, CLOSED_S, SINGLE_S, OPEN_S, TURN_S, BULK_S = 3.0, 10.0, 5.0, 6.0, 5.0, 20.0
PACED_PER_S = 1000.0


def measure() -> Iterator[dict[str, Any]]:
    """The generator itself, the systems, and what is compared within ours."""
    with tempfile.TemporaryDirectory() as name:
        folder, pairs = Path(name), traffic.asked()
        traffic.write_stores(folder)
        write_fleet(folder / "fleet", BASE, ADAPTERS)
        yield generator(folder)
        found: dict[str, list[dict[str, Any]]] = {}
        for _ in range(ROUNDS):
            for system, started in systems(pairs).items():
                found.setdefault(system, []).append(of_system(folder, started))
                print(system, found[system][-1], file=sys.stderr, flush=True)
        for system, runs in found.items():
            yield {"part": "systems", "system": system, "rounds": runs}
        yield no_op(folder, pairs)
        for quantization in ("none", "int8"):
            yield adapters(folder, pairs, quantization)
            yield beside_bulk(folder, pairs, quantization)
            yield fan_out(folder, pairs, quantization)


def generator(folder: Path) -> dict[str, Any]:
    """What the generator reaches where there is nothing to wait for."""
    port, request = free_port(), traffic.of_ours("spam", ["Is this all that it can do?"])
    with served(["-m", "benchmarks.peers.trivial", str(port)], port, request):
        load = run(closed(port, cycle([request]), CONNECTIONS, TURN_S))
        paced = run(opened(port, cycle([request]), PACED_PER_S, TURN_S))
    return {
        "part": "generator",
        "closed": load.told(),
        "open": {"rate": PACED_PER_S, **paced.told()},
        "cpu_us": 1e6 * load.cpu_s / len(load.latencies_ms),
    }


def of_system(folder: Path, system: System) -> dict[str, Any]:
    """Start a system, load it in all ways, stop it."""
    port, requests = free_port(), system.requests()
    command = system.command(folder, port)
    with served(command, port, next(requests), system.environment):
        _warm(port, system.requests(), WARM_S)
        load = _whole(run(closed(port, requests, CONNECTIONS, CLOSED_S)))
        alone = _whole(run(closed(port, requests, 1, SINGLE_S)))
        rate, curve = highest_rate(port, requests, load.per_s)
    return {"closed": load.told(), "single": alone.told(), "rate": rate, "open": curve}


def highest_rate(
    port: int, requests: Iterator[bytes], per_s: float
) -> tuple[float, list[dict[str, float]]]:
    """The highest rate that was held, and all that was tried."""
    curve: list[dict[str, float]] = []

    def holds(rate: float) -> bool:
        load = run(opened(port, requests, rate, OPEN_S))
        curve.append({"rate": rate, **load.told()})
        for _ in range(3):  # what was left behind is worked off first
            answers(port, next(requests))
        return not load.failed and load.percentile(95) <= MAX_P95_MS

    held = highest(holds, per_s)
    return held, sorted(curve, key=lambda one: one["rate"])


def no_op(folder: Path, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A forward of zeros, against an ingress that asks no model."""
    port, store = free_port(), folder / "two-labels"
    apps = [
        application(store, "none", f"benchmarks.noop.{which}", f"/{which}")
        for which in ("hop", "here")
    ]
    command = ["-m", "deployments", config(folder, port, apps)]
    # Two applications beside each other, of which one waits: CPUs for both, to Ray's mind.
    more = {**FAST, "RAY_OVERRIDE_RESOURCES": '{"CPU": 8}'}
    loads = {which: traffic.ours(pairs, f"/{which}") for which in ("hop", "here")}
    with served(command, port, traffic.of_ours("spam", ["x"], "/hop"), more) as home:
        runs = _in_turns(port, loads)
        cpu = {which: _cpu_us(home, port, loads[which], f":{which}:") for which in loads}
    return {
        "part": "no-op",
        "runs": _told(runs),
        "ratio": _ratio(runs, "hop", "here"),
        "cpu_us": cpu,
    }


def _cpu_us(home: Path, port: int, requests: Iterator[bytes], mine: str) -> dict[str, float]:
    """CPU that a request takes, in µs, of each replica of an application and of HAProxy."""
    before = cpu_s(home)
    load = _whole(run(closed(port, requests, CONNECTIONS, TURN_S)))
    return {
        title.rpartition(mine)[2].rpartition("/")[2]: 1e6
        * (taken - before.get(title, 0))
        / len(load.latencies_ms)
        for title, taken in cpu_s(home).items()
        if mine in title or title.endswith("/haproxy")
    }


def adapters(folder: Path, pairs: Sequence[tuple[str, str]], quantization: str) -> dict[str, Any]:
    """Requests for 64 tasks in turn, against requests for one of them; the same texts."""
    port, names = free_port(), [f"task-{index:05d}" for index in range(ADAPTERS)]
    texts = [text for _, text in pairs]
    many = [(names[i % ADAPTERS], text) for i, text in enumerate(texts)]
    loads = {
        "64": traffic.ours(many),
        "1": traffic.ours([(names[0], text) for text in texts]),
    }
    command = command_of_ours(folder, port, quantization, "fleet")
    with served(command, port, next(loads["64"]), FAST):
        runs = _in_turns(port, loads)
    return {
        "part": "adapters",
        "quantization": quantization,
        "runs": _told(runs),
        "ratio": _ratio(runs, "64", "1"),
    }


def beside_bulk(
    folder: Path, pairs: Sequence[tuple[str, str]], quantization: str
) -> dict[str, Any]:
    """Single texts alone, and while a connection sends 512 texts at a time."""
    port, singles = free_port(), traffic.ours(pairs)
    texts = [text for task, text in pairs if task == "sentiment"]
    bulk = cycle([traffic.of_ours("sentiment", (texts * BULK)[:BULK])])
    runs: dict[str, list[Load]] = {"alone": [], "beside": [], "bulk": []}

    async def both() -> tuple[Load, Load]:
        return await asyncio.gather(
            closed(port, singles, CONNECTIONS, BULK_S), closed(port, bulk, 1, BULK_S)
        )

    with served(command_of_ours(folder, port, quantization), port, next(singles), FAST):
        _warm(port, singles, WARM_S)
        assert answers(port, next(bulk))
        for _ in range(BULK_TURNS):
            runs["alone"].append(_whole(run(closed(port, singles, CONNECTIONS, BULK_S))))
            beside, by = run(both())
            runs["beside"].append(_whole(beside))
            runs["bulk"].append(_whole(by))
    ratios = [
        with_it.percentile(95) / without.percentile(95)
        for with_it, without in zip(runs["beside"], runs["alone"], strict=True)
    ]
    return {
        "part": "bulk",
        "quantization": quantization,
        "runs": _told({name: runs[name] for name in ("alone", "beside")}),
        # Of the requests that were answered: what is on its way at the end is a large part.
        "bulk_texts_per_s": statistics.median(
            BULK * len(load.latencies_ms) / (sum(load.latencies_ms) / 1e3) for load in runs["bulk"]
        ),
        "ratio": statistics.median(ratios),
    }


def fan_out(folder: Path, pairs: Sequence[tuple[str, str]], quantization: str) -> dict[str, Any]:
    """One text for ten tasks, in one request and in ten one after another; and at which rate."""
    port, names = free_port(), [f"task-{index:05d}" for index in range(FANNED)]
    texts = [text for _, text in pairs]
    at_once = cycle(
        [
            post("/v1/predict", json.dumps({"tasks": names, "texts": [text]}).encode())
            for text in texts
        ]
    )
    singly = cycle([traffic.of_ours(name, [text]) for text in texts for name in names])
    runs: dict[str, list[Load]] = {"at once": [], "singly": []}
    command = command_of_ours(folder, port, quantization, "fleet")
    with served(command, port, next(singly), FAST):
        _warm(port, singly, WARM_S, FANNED)
        _warm(port, at_once, WARM_S)
        for _ in range(TURNS):
            runs["at once"].append(_whole(run(closed(port, at_once, 1, TURN_S))))
            runs["singly"].append(_whole(run(closed(port, singly, 1, TURN_S))))
        load = _whole(run(closed(port, at_once, CONNECTIONS, TURN_S)))
        rate, curve = highest_rate(port, at_once, load.per_s)
        told = json.loads(answer(port, next(at_once)) or "{}")
        if told.get("failed"):  # which is no failed request
            raise RuntimeError(f"tasks failed: {told['failed']}")
    # Ten requests make one of the other.
    ratio = statistics.median(
        one.percentile(50) / (FANNED * ten.percentile(50))
        for one, ten in zip(runs["at once"], runs["singly"], strict=True)
    )
    return {
        "part": "fan-out",
        "quantization": quantization,
        "runs": _told(runs),
        "ratio": ratio,
        "closed": load.told(),
        "rate": rate,
        "open": curve,
    }


def _in_turns(port: int, loads: dict[str, Iterator[bytes]]) -> dict[str, list[Load]]:
    """Warm each up, then A B A B …, closed loop."""
    for requests in loads.values():
        _warm(port, requests, WARM_S, ADAPTERS)
    runs: dict[str, list[Load]] = {name: [] for name in loads}
    for _ in range(TURNS):
        for name, requests in loads.items():
            runs[name].append(_whole(run(closed(port, requests, CONNECTIONS, TURN_S))))
    return runs


def _warm(port: int, requests: Iterator[bytes], seconds: float, tasks: int = 5) -> None:
    """Ask every task, so that no adapter is cold, and then for a while."""
    for _ in range(2 * tasks):  # they come in no order
        assert answers(port, next(requests))
    run(closed(port, requests, CONNECTIONS, seconds))


def _whole(load: Load) -> Load:
    if load.failed or not load.latencies_ms:
        raise RuntimeError(f"{load.failed} requests failed beside {len(load.latencies_ms)}")
    return load


def _told(runs: dict[str, list[Load]]) -> dict[str, list[dict[str, float]]]:
    return {name: [load.told() for load in loads] for name, loads in runs.items()}


def _ratio(runs: dict[str, list[Load]], of: str, to: str) -> float:
    """Median over the turns of one's requests a second by another's."""
    return statistics.median(a.per_s / b.per_s for a, b in zip(runs[of], runs[to], strict=True))
