"""Does anything grow? `python -m benchmarks.soak --minutes 10`, before a release.

A server as `make serve` starts it, under mixed load: single texts, many texts, many tasks, callers
that go before their answer, tasks that do not exist; and all the time adapters are uploaded, asked,
activated and deleted. After a warm-up, each replica's memory is read every second: what it has
written itself, since pages of files and libraries count for one or another as processes beside it
come and go. The medians of the first and the last fifth of the time are compared: for all replicas
together it may grow by 2 %, and for each that computes nothing by 5 %. Files, threads and asyncio
tasks are compared at rest, after the warm-up and at the end.

Every half a minute protobuf gives back what a model replica keeps free, up to 90 MiB, which is then
taken again: for ten minutes that is nothing, within one the median moves by up to 5 % of all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from benchmarks.load import HOST, post
from benchmarks.record import ROOT
from benchmarks.servers import FAST, config, free_port, served
from benchmarks.use import Use, loop_tasks, uses

TASKS = ("aspects", "sentiment", "spam", "topic")
TEXTS = (
    "I absolutely loved this product!",
    "The parcel came late and nobody answered, so I want my money back before the end of the week.",
    "Win a prize now",
)
# At rest until Ray, which tells of an event loop every 10 s, has told of one that rests.
WARM_S, SAMPLE_S, REST_S = 60.0, 1.0, 15.0
CALLERS, PAUSE_S = 4, 0.1
# Tasks that come and go, one after another under so many names: one that was deleted is free again
# when requests that are on their way have ended.
NAMES = 64
PARTS = 5
MOST_GROWTH, MOST_GROWTH_OF_ONE = 0.02, 0.05
# Of files, threads and asyncio tasks of a replica: connections that are kept, threads of a pool.
MOST_MORE = 4


class Soaked(NamedTuple):
    """What was found, by replica: at rest before and after, and while it was asked."""

    asked: Counter[str]
    before: dict[str, Use]
    samples: list[dict[str, Use]]
    after: dict[str, Use]


def main(minutes: float, most_growth: float = MOST_GROWTH) -> int:
    """Soak, tell what was found, and return an exit status: 1 if something grew or failed."""
    soaked = asyncio.run(_soak(60 * minutes))
    told = {
        "minutes": minutes,
        "asked": soaked.asked,
        "at_rest": [soaked.before, soaked.after],
        "mib": {name: memory(soaked.samples, name) for name in soaked.before},
        "grew": grew(soaked, most_growth),
    }
    print(json.dumps(told))
    failed = [name for name in soaked.asked if name.startswith("failed")]
    return 1 if failed or told["grew"] else 0


def memory(samples: Sequence[Mapping[str, Use]], name: str) -> list[float]:
    """Return the medians of a replica's MiB in equal parts of the time, 0 if it was not there."""
    size = len(samples) / PARTS
    parts = [samples[int(n * size) : int((n + 1) * size)] for n in range(PARTS)]
    found = [[use[name].mib for use in part if name in use] for part in parts]
    return [statistics.median(mib or [0.0]) for mib in found]


def grew(soaked: Soaked, most_growth: float) -> list[str]:
    """Name what grew by more than it may."""
    if soaked.before.keys() != soaked.after.keys():
        return [f"other replicas: {[*soaked.before]}, then {[*soaked.after]}"]
    found = [
        f"{name} {thing}"
        for name, before in soaked.before.items()
        for thing in ("files", "threads", "tasks")
        if getattr(soaked.after[name], thing) > getattr(before, thing) + MOST_MORE
    ]
    medians = {name: memory(soaked.samples, name) for name in soaked.before}
    found += [
        f"{name} memory"
        for name, of_one in medians.items()
        if not name.startswith("Model") and of_one[-1] > of_one[0] * (1 + MOST_GROWTH_OF_ONE)
    ]
    first, last = (sum(of_one[n] for of_one in medians.values()) for n in (0, -1))
    return found + ["memory"] * (last > first * (1 + most_growth))


async def _soak(seconds: float) -> Soaked:
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
            async with httpx2.AsyncClient(base_url=f"http://{HOST}:{port}", timeout=60) as client:
                load = Load(client, folder / "store", home)
                await load.run(min(WARM_S, seconds))
                before = await load.at_rest()
                samples = await load.run(seconds)
                return Soaked(load.asked, before, samples, await load.at_rest())


class Load:
    """All who ask and change at a time, and what the server has meanwhile."""

    def __init__(self, client: httpx2.AsyncClient, store: Path, home: Path) -> None:
        self.asked: Counter[str] = Counter()
        self._home = home
        self._work: list[Callable[[], Awaitable[None]]] = [
            Caller(client, self.asked, random.Random(n)).ask for n in range(CALLERS)
        ]
        self._work.append(Changes(client, self.asked, store / "spam").come_and_go)

    async def run(self, seconds: float) -> list[dict[str, Use]]:
        """Ask and change for so long; return what replicas had all the time."""
        samples: list[dict[str, Use]] = []
        ends_s = time.monotonic() + seconds

        async def repeat(work: Callable[[], Awaitable[None]]) -> None:
            while time.monotonic() < ends_s:
                try:
                    await work()
                except (httpx2.HTTPError, AssertionError) as error:
                    self.asked[f"failed: {error!r:.200}"] += 1
                await asyncio.sleep(PAUSE_S)

        async def sample() -> None:
            while time.monotonic() < ends_s:
                samples.append(await asyncio.to_thread(uses, self._home, {}))
                await asyncio.sleep(SAMPLE_S)

        await asyncio.gather(*map(repeat, self._work), sample())
        return samples

    async def at_rest(self) -> dict[str, Use]:
        """Return what replicas have when nobody has asked for a while."""
        await asyncio.sleep(REST_S)
        return uses(self._home, await loop_tasks(self._home))


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.soak")
    parser.add_argument("--minutes", type=float, default=10.0)
    sys.exit(main(parser.parse_args().minutes))
