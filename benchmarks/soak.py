"""Does anything grow? `python -m benchmarks.soak --minutes 10`, before a release.

A server as `make serve` starts it, under mixed load: single texts, many texts, many tasks, callers
that go before their answer, tasks that do not exist; and all the time adapters are uploaded, asked,
activated and deleted. Every few seconds each replica's memory (USS: what would be free without it),
open files, threads and asyncio tasks are read. After a warm-up, the median of the last fifth of the
time is compared with that of the first. Memory of all replicas together may grow by 2 %; files,
threads and tasks of each by a few, which are in use at the moment.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import psutil

from benchmarks.load import HOST, post
from benchmarks.record import ROOT
from benchmarks.servers import FAST, config, free_port, served, started_from

TASKS = ("aspects", "sentiment", "spam", "topic")
TEXTS = (
    "I absolutely loved this product!",
    "The parcel came late and nobody answered, so I want my money back before the end of the week.",
    "Win a prize now",
)
WARM_S, SAMPLE_S = 60.0, 3.0
CALLERS, PAUSE_S = 4, 0.1
# Tasks that come and go, one after another under so many names: one that was deleted is free again
# when requests that are on their way have ended.
NAMES = 64
PARTS = 5
MOST_GROWTH = 0.02
# Of files, threads and asyncio tasks of a replica: what is in use differs from moment to moment.
MOST_MORE = 8
# Ray tells an event loop's tasks with all other metrics.
_LOOP_TASKS = re.compile(
    r'^ray_serve_event_loop_tasks\{.*deployment="(\w+)".*\} ([\d.]+)$', re.MULTILINE
)


class Use(NamedTuple):
    """What a replica has at a moment; `tasks` is 0 where Ray has not told it."""

    mib: float
    files: int
    threads: int
    tasks: int


Samples = list[tuple[float, dict[str, Use]]]


def main(minutes: float) -> int:
    """Soak, tell what was found, and return an exit status: 1 if something grew or failed."""
    asked, samples = asyncio.run(_soak(60 * minutes))
    grown = growth(samples, min(WARM_S, 20 * minutes))
    print(json.dumps({"minutes": minutes, "asked": asked, **grown}))
    bad = [name for name in asked if name.startswith("failed")]
    return 1 if bad or too_much(grown) else 0


def growth(samples: Samples, warm_s: float) -> dict[str, Any]:
    """Say how what replicas have changed after the warm-up.

    Returns:
        `replicas`: for each, of each thing the medians of five parts of the time;
        `memory_growth`: of all together, from the first part to the last.
    """
    begun_s, ended_s = samples[0][0] + warm_s, samples[-1][0]
    parts: list[list[dict[str, Use]]] = [[] for _ in range(PARTS)]
    for at_s, use in samples:
        if at_s >= begun_s:
            part = int(PARTS * (at_s - begun_s) / (ended_s - begun_s))
            parts[min(part, PARTS - 1)].append(use)
    replicas = {
        name: {
            thing: [statistics.median(getattr(use[name], thing) for use in part) for part in parts]
            for thing in Use._fields
        }
        for name in parts[0][0]
    }
    then, now = (sum(found["mib"][n] for found in replicas.values()) for n in (0, -1))
    return {"replicas": replicas, "memory_growth": now / then - 1}


def too_much(grown: Mapping[str, Any]) -> list[str]:
    """Name what grew by more than it may."""
    found = [
        f"{name} {thing}"
        for name, things in grown["replicas"].items()
        for thing, medians in things.items()
        if thing != "mib" and medians[-1] > medians[0] + MOST_MORE
    ]
    return found + ["memory"] * (grown["memory_growth"] > MOST_GROWTH)


async def _soak(seconds: float) -> tuple[Counter[str], Samples]:
    port, probe = free_port(), post("/v1/tasks/spam/predict", b'{"texts": ["x"]}')
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "examples" / "store", folder / "store")
        application = {
            "name": "soak",
            "route_prefix": "/",
            "import_path": "deployments.app:build",
            "args": {
                "base_model": "examples/base",
                "adapter_store": str(folder / "store"),
                # So small that both are full before the warm-up ends.
                "bank_gib": 0.005,
                "max_host_gib": 0.01,
            },
        }
        path = config(folder, port, [application])
        more = FAST | {"RAY_AUTH_MODE": "disabled"}
        with served(["-m", "deployments", path], port, probe, more) as home:
            return await _load(f"http://{HOST}:{port}", folder / "store", home, seconds)


async def _load(url: str, store: Path, home: Path, seconds: float) -> tuple[Counter[str], Samples]:
    asked: Counter[str] = Counter()
    samples: Samples = []
    ends_s = time.monotonic() + seconds

    async def repeat(work: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() < ends_s:
            try:
                await work()
            except (httpx2.HTTPError, AssertionError) as error:
                asked[f"failed: {error!r:.200}"] += 1
            await asyncio.sleep(PAUSE_S)

    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
        callers = [Caller(client, asked, random.Random(n)).ask for n in range(CALLERS)]
        changes = Changes(client, asked, store / "spam")
        repeated = [repeat(work) for work in (*callers, changes.come_and_go)]
        await asyncio.gather(*repeated, _sample(home, samples, ends_s))
    return asked, samples


class Caller:
    """Asks what callers ask."""

    def __init__(
        self, client: httpx2.AsyncClient, asked: Counter[str], dice: random.Random
    ) -> None:
        self._client, self._asked, self._dice = client, asked, dice

    async def ask(self) -> None:
        """Make one request of a kind drawn by chance."""
        kinds = (self._one, self._one, self._one, self._many, self._tasks, self._gone, self._wrong)
        kind = self._dice.choice(kinds)
        await kind()
        self._asked[kind.__name__.strip("_")] += 1

    async def _one(self) -> None:
        await self._predict(self._dice.choice(TASKS), texts=[self._dice.choice(TEXTS)])

    async def _many(self) -> None:
        await self._predict(self._dice.choice(TASKS), texts=self._dice.choices(TEXTS, k=24))

    async def _tasks(self) -> None:
        body = {"tasks": list(TASKS), "texts": [self._dice.choice(TEXTS)]}
        response = await self._client.post("/v1/predict", json=body)
        assert response.status_code == 200, response.text

    async def _gone(self) -> None:
        with contextlib.suppress(httpx2.TimeoutException):
            await self._client.post(
                f"/v1/tasks/{self._dice.choice(TASKS)}/predict",
                json={"texts": self._dice.choices(TEXTS, k=24)},
                timeout=self._dice.uniform(0.001, 0.05),
            )

    async def _wrong(self) -> None:
        response = await self._client.post(
            f"/v1/tasks/no-{time.time_ns()}/predict", json={"text": "x"}
        )
        assert response.status_code == 404, response.text

    async def _predict(self, task: str, **body: Any) -> None:
        response = await self._client.post(f"/v1/tasks/{task}/predict", json=body)
        assert response.status_code == 200, response.text


class Changes:
    """Uploads, activates and deletes adapters, each with weights of its own."""

    def __init__(self, client: httpx2.AsyncClient, asked: Counter[str], adapter: Path) -> None:
        self._client, self._asked = client, asked
        self._weights = (adapter / "adapter_model.safetensors").read_bytes()
        self._rules = (adapter / "task.json").read_bytes()
        self._config = json.loads((adapter / "adapter_config.json").read_text())
        self._alphas = itertools.count(1)

    async def come_and_go(self) -> None:
        """Let a task come, be another version, and go."""
        alpha = next(self._alphas)
        task = f"guest-{alpha % NAMES}"
        first = await self._put(task, alpha)
        await self._answers(task, first)
        second = await self._put(task, alpha + 0.5)
        await self._done("patch", f"/v1/tasks/{task}", json={"active": second})
        await self._answers(task, second)
        await self._done("delete", f"/v1/tasks/{task}/versions/{first}")
        await self._done("delete", f"/v1/tasks/{task}")
        self._asked["came and went"] += 1

    async def _put(self, task: str, alpha: float) -> str:
        given = json.dumps(self._config | {"lora_alpha": alpha}).encode()
        contents = {
            "adapter_config.json": given,
            "adapter_model.safetensors": self._weights,
            "task.json": self._rules,
        }
        files = [("files", named) for named in contents.items()]
        put = await self._done("put", f"/v1/tasks/{task}/versions", files=files)
        return str(put["version"])

    async def _answers(self, task: str, version: str) -> None:
        path = f"/v1/tasks/{task}/predict"
        answer = await self._done("post", path, json={"texts": list(TEXTS)})
        assert answer["version"] == version, answer

    async def _done(self, method: str, path: str, **given: Any) -> Any:
        response = await self._client.request(method.upper(), path, **given)
        assert response.status_code in (200, 201, 202, 204), (method, path, response.text)
        return response.json() if response.content else None


async def _sample(home: Path, samples: Samples, ends_s: float) -> None:
    metrics = f"http://{HOST}:{_metrics_port(home)}/metrics"
    async with httpx2.AsyncClient(timeout=20) as client:
        while time.monotonic() < ends_s:
            page = (await client.get(metrics)).text
            tasks: dict[str, int] = defaultdict(int)
            for deployment, count in _LOOP_TASKS.findall(page):
                tasks[deployment] += int(float(count))
            samples.append((time.monotonic(), await asyncio.to_thread(_use, home, tasks)))
            await asyncio.sleep(SAMPLE_S)


def _use(home: Path, tasks: Mapping[str, int]) -> dict[str, Use]:
    """By deployment and pid: one that is replaced is another."""
    found = {}
    for pid in started_from(home):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            title = re.search(r"ServeReplica:soak:(\w+)", " ".join(process.cmdline()))
            if title is not None:
                name = title[1]
                found[f"{name} {pid}"] = Use(
                    process.memory_full_info().uss / 2**20,
                    process.num_fds(),
                    process.num_threads(),
                    tasks.get(name, 0),
                )
    return found


def _metrics_port(home: Path) -> int:
    (file,) = home.glob("ray/session_latest/metrics_export_port_*")
    return int(file.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.soak")
    parser.add_argument("--minutes", type=float, default=10.0)
    sys.exit(main(parser.parse_args().minutes))
