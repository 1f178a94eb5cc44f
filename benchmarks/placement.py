"""How often is an adapter asked for where it is resident, where slots are few?

400 adapters asked for by Zipf's law (1.0) from 32 connections, four model replicas of 128 slots, a
tiny base with random weights; over HTTP, HAProxy and throughput mode. Placement by what replicas
hold, against two replicas at random of which the one with less to do is taken, as Ray Serve's own
router does. Each version that a replica brings into a slot is a miss, into an empty one too. Then
all ask for one adapter: after how long all replicas hold it.
"""

from __future__ import annotations

import http.client
import json
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from benchmarks import traffic
from benchmarks.bars import bars
from benchmarks.fleet import write_fleet
from benchmarks.load import HOST, closed, run
from benchmarks.record import table
from benchmarks.servers import FAST, config, free_port, served
from benchmarks.systems import BASE

ADAPTERS, SLOTS, REPLICAS, CONNECTIONS = 400, 128, 4, 32
LOAD_S, HOT_S = 45.0, 6.0
OURS, QUEUES = "by residency", "by queues"
_BUILDERS = {OURS: "deployments.app", QUEUES: "benchmarks.peers.two_choices"}
# Misses are counted in logs, which throughput mode else keeps back.
_LOGGED = {"RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1"}


def measure() -> Iterator[dict[str, Any]]:
    """Both ways to place rows, under the same requests."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, store = tiny_base(folder / "base"), folder / "store"
        store.mkdir()
        tasks = write_fleet(store, base, ADAPTERS)
        for placed, builder in _BUILDERS.items():
            yield {"placed": placed, **of_placement(folder, builder, base, store, tasks)}


def tiny_base(folder: Path) -> str:
    """Write a base whose forward costs next to nothing, with the example's tokenizer."""
    shutil.copytree(BASE, folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64}
    BertModel(BertConfig(**size, num_hidden_layers=2, num_attention_heads=2)).save_pretrained(
        folder
    )
    return str(folder)


def of_placement(
    folder: Path, builder: str, base: str, store: Path, tasks: Sequence[str]
) -> dict[str, Any]:
    """Start the application, ask for all, then for one."""
    port = free_port()
    application = {
        "name": "onebase",
        "route_prefix": "/",
        "import_path": f"{builder}:build",
        "args": {
            "base_model": base,
            "adapter_store": str(store),
            "quantization": "none",
            "device": "cpu",
            "num_cpus": 1,
            "num_replicas": REPLICAS,
            "adapter_slots": SLOTS,
        },
    }
    command = ["-m", "deployments", config(folder, port, [application])]
    more = {**FAST, **_LOGGED, "RAY_OVERRIDE_RESOURCES": '{"CPU": 16}'}
    dice = random.Random(0)
    asked = dice.choices(tasks, [1 / (n + 1) for n in range(len(tasks))], k=100_000)
    requests = cycle([traffic.of_ours(task, ["How is this one called?"]) for task in asked])
    with served(command, port, next(requests), more) as home:
        load = run(closed(port, requests, CONNECTIONS, LOAD_S))
        num_asked, num_missed = len(load.latencies_ms), loads(home)
        told = {"requests": num_asked, "misses": num_missed, "failed": load.failed}
        hot = tasks[-1]
        shared_s = share(port, hot)
    return {
        **told,
        "hit_share": 1 - num_missed / num_asked,
        "per_s": load.per_s,
        "hot_shared_s": shared_s,
    }


def loads(home: Path) -> int:
    """How many versions all replicas have brought into slots."""
    logs = [path for path in home.rglob("replica_*Model*.log") if not path.is_symlink()]
    return sum(path.read_text().count(" to=slot:") for path in logs)


def share(port: int, task: str) -> float | None:
    """Let all ask for one task; return in how many seconds all replicas held it, None if never."""
    found: list[float] = []
    started_s = time.perf_counter()

    def watch() -> None:
        while not found and time.perf_counter() - started_s < HOT_S:
            if holders(port, task) == REPLICAS:
                found.append(time.perf_counter() - started_s)
            time.sleep(0.05)

    watching = threading.Thread(target=watch)
    watching.start()
    run(closed(port, cycle([traffic.of_ours(task, ["Hot?"])]), CONNECTIONS, HOT_S))
    watching.join()
    return found[0] if found else None


def holders(port: int, task: str) -> int:
    """How many replicas have a task in a slot."""
    connection = http.client.HTTPConnection(HOST, port, timeout=20)
    connection.request("GET", "/v1/residency?limit=1000")
    told = json.loads(connection.getresponse().read())
    connection.close()
    of_task = [one["replicas"] for one in told["versions"] if one["task"] == task]
    return sum(one["where"] == "slot" for replicas in of_task for one in replicas.values())


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    columns = ["placed", "requests", "misses", "where it is resident", "one for all, on all after"]
    return table(
        columns,
        [
            [
                row["placed"],
                f"{row['requests']:,}",
                f"{row['misses']:,}",
                f"{row['hit_share']:.1%}",
                "never" if row["hot_shared_s"] is None else f"{row['hot_shared_s']:.1f} s",
            ]
            for row in rows
        ],
    )


def draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:
    axes = figure.subplots()
    missed = [100 * row["misses"] / row["requests"] for row in rows]
    bars(axes, [row["placed"] for row in rows], {"misses": missed})
    axes.set_ylabel("misses, % of requests")


def in_short(rows: Sequence[dict[str, Any]]) -> str:
    of = {row["placed"]: row for row in rows}
    return (
        f"{ADAPTERS} adapters, {REPLICAS} replicas of {SLOTS} slots: {of[OURS]['hit_share']:.1%} "
        "of the requests reach a replica that has the adapter in a slot, "
        f"{of[QUEUES]['hit_share']:.1%} where rows are placed by queues alone."
    )
