"""The catalog of a whole server, two ingresses and two model replicas, under load and fault."""

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("alpha", "beta", "gamma", "delta")
TEXT = "I absolutely loved this product!"
RATE = 50.0  # predictions a second
MANY = [
    {"name": "Ingress", "num_replicas": 2, "ray_actor_options": {"num_cpus": 0}},
    {"name": "Model", "num_replicas": 2, "ray_actor_options": {"num_cpus": 0}},
]


@dataclass(frozen=True)
class Answer:
    task: str
    sent_s: float
    got_s: float
    status: int
    said: Any


@dataclass
class Load:
    """Predictions at a steady rate over all tasks, whatever else happens."""

    url: str
    rate: float = RATE
    answers: list[Answer] = field(default_factory=list)
    _ending: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Load":
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        rng = random.Random(5)
        limits = httpx2.Limits(max_connections=32)
        with (
            httpx2.Client(base_url=self.url, timeout=30, limits=limits) as http,
            ThreadPoolExecutor(32) as pool,
        ):
            next_s = time.monotonic()
            while not self._ending.is_set():
                pool.submit(self._ask, http, rng.choice(TASKS))
                next_s += 1 / self.rate
                time.sleep(max(0.0, next_s - time.monotonic()))

    def _ask(self, http: httpx2.Client, task: str) -> None:
        sent_s = time.monotonic()
        try:
            response = http.post(f"/v1/tasks/{task}/predict", json={"texts": [TEXT]})
            status, said = response.status_code, response.json()
        except (httpx2.TransportError, ValueError) as error:
            status, said = 0, repr(error)
        self.answers.append(Answer(task, sent_s, time.monotonic(), status, said))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("load") / "store"
    store.mkdir()
    return store


@pytest.fixture(scope="module")
def make_version(make_adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns the files of a random adapter of two labels; another seed is another version."""
    from safetensors.torch import load, save

    made = make_adapter(tmp_path_factory.mktemp("made") / "one")
    weights = load((made / "adapter_model.safetensors").read_bytes())

    def make(seed: int) -> list[Any]:
        changed = {name: tensor.clone() for name, tensor in weights.items()}
        next(iter(changed.values())).view(-1)[0] = float(seed + 1)
        return [
            ("files", ("adapter_config.json", (made / "adapter_config.json").read_bytes())),
            ("files", ("adapter_model.safetensors", save(changed))),
        ]

    return make


@pytest.fixture(scope="module")
def running(a_server: Any, store: Path, make_version: Any) -> Iterator[Any]:
    with a_server() as server:
        start(server, store)
        for seed, task in enumerate(TASKS):
            upload(server.url, task, make_version(seed))
        yield server


def start(server: Any, store: Path) -> None:
    config = server.write_config(
        deployments=MANY, adapter_store=str(store), quantization="none", num_cpus=1
    )
    server.start("-m", "deployments", config)
    server.wait_until(lambda: "ready" in server.log.read_text())
    server.wait_until(server.answers)


def upload(url: str, task: str, files: list[Any], **query: Any) -> str:
    path = f"{url}/v1/tasks/{task}/versions"
    answer = httpx2.put(path, files=files, params=query, timeout=60)
    assert answer.status_code in (200, 201), answer.text
    return str(answer.json()["version"])


def get(url: str, task: str) -> Any:
    answer = httpx2.get(f"{url}/v1/tasks/{task}", timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def answering(url: str, task: str) -> frozenset[str]:
    told = get(url, task)
    return frozenset((told["active"], *told["traffic"]))


def catalog_pid(server: Any) -> int:
    (pid,) = [p for p, line in server.processes().items() if "ServeReplica:onebase:Catalog" in line]
    return int(pid)


class Changer:
    """One random change after the other, and which versions had traffic when."""

    def __init__(self, url: str, make_version: Any) -> None:
        self._url, self._make = url, make_version
        self._rng = random.Random(11)
        self._seed = 100
        now_s = time.monotonic()
        # (from, until, versions that had traffic in that time), one after the other.
        self.had = {task: [[now_s, None, answering(url, task)]] for task in TASKS}
        self.counts: dict[str, int] = {}

    def change(self) -> None:
        task = self._rng.choice(TASKS)
        kind = self._rng.choice(("upload", "activate", "split", "rollback", "delete"))
        told = get(self._url, task)
        others = [v for v in told["versions"] if v not in (told["active"], *told["traffic"])]
        if (kind == "activate" and len(told["versions"]) < 2) or (kind == "delete" and not others):
            kind = "upload"
        started_s = time.monotonic()
        response = self._call(kind, task, told, others)
        ended_s = time.monotonic()
        refused = kind == "rollback" and response.status_code == 409  # nothing was before
        assert response.status_code in (200, 201) or refused, (kind, response.text)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        before, after = self.had[task][-1][2], answering(self._url, task)
        self.had[task][-1][1] = started_s
        self.had[task].append([started_s, ended_s, before | after])
        self.had[task].append([ended_s, None, after])

    def _call(self, kind: str, task: str, told: Any, others: list[str]) -> httpx2.Response:
        path = f"{self._url}/v1/tasks/{task}"
        versions = list(told["versions"])
        if kind == "upload":
            self._seed += 1
            return httpx2.put(f"{path}/versions", files=self._make(self._seed), timeout=60)
        if kind == "activate":
            chosen = self._rng.choice(versions)
            return httpx2.patch(path, json={"active": chosen}, timeout=60)
        if kind == "split":
            beside = [version for version in versions if version != told["active"]]
            some = self._rng.sample(beside, min(len(beside), 2))
            return httpx2.patch(path, json={"traffic": dict.fromkeys(some, 0.3)}, timeout=60)
        if kind == "rollback":
            return httpx2.post(f"{path}/rollback", timeout=60)
        return httpx2.delete(f"{path}/versions/{self._rng.choice(others)}", timeout=60)

    def allowed(self, answer: Answer) -> set[str]:
        """Versions that had traffic at some moment while the answer was on its way."""
        versions: set[str] = set()
        for begin_s, end_s, had in self.had[answer.task]:
            if begin_s <= answer.got_s and (end_s is None or end_s >= answer.sent_s):
                versions |= had
        return versions


def assert_none_failed(load: Load) -> None:
    failed = [answer for answer in load.answers if answer.status != 200]
    assert not failed, (len(failed), len(load.answers), failed[:3])
    wrong = [a for a in load.answers if "error" in a.said["results"][0]]
    assert not wrong, wrong[:3]


def told_latency(load: Load) -> float:
    """Prints how long predictions took; returns the 99th percentile in ms."""
    took_ms = sorted(1e3 * (answer.got_s - answer.sent_s) for answer in load.answers)
    print(
        f"{len(took_ms)} predictions: p50 {took_ms[len(took_ms) // 2]:.0f} ms, "
        f"p99 {took_ms[int(len(took_ms) * 0.99)]:.0f} ms, longest {took_ms[-1]:.0f} ms"
    )
    return took_ms[int(len(took_ms) * 0.99)]


def test_a_hundred_changes_under_load_fail_no_prediction(running: Any, make_version: Any) -> None:
    changer = Changer(running.url, make_version)
    with Load(running.url) as quiet:
        time.sleep(5)
    with Load(running.url) as load:
        time.sleep(1)
        for _ in range(100):
            changer.change()
        time.sleep(0.5)
    before_ms, during_ms = told_latency(quiet), told_latency(load)
    assert during_ms < 5 * before_ms + 500, "a change makes no request slow"
    print(changer.counts)
    assert_none_failed(load)
    assert len(load.answers) > 100
    assert len({answer.said["version"] for answer in load.answers}) > 10
    for answer in load.answers:
        assert answer.said["version"] in changer.allowed(answer), answer
    assert set(changer.counts) == {"upload", "activate", "split", "rollback", "delete"}


@pytest.mark.parametrize("count", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_eight_clients_change_at_once_and_no_update_is_lost(running: Any, count: int) -> None:
    """Each reads a task and writes it back under If-Match."""
    acknowledged: list[tuple[str, int, float]] = []
    num_stale = 0
    lock = threading.Lock()

    def client(number: int) -> None:
        nonlocal num_stale
        rng = random.Random(number)
        with httpx2.Client(base_url=running.url, timeout=60) as http:
            for index in range(count):
                path = f"/v1/tasks/{rng.choice(TASKS)}"
                rate = (number * count + index) / (8 * count)
                while True:
                    etag = http.get(path).headers["etag"]
                    answer = http.patch(
                        path, json={"max_error_rate": rate}, headers={"if-match": etag}
                    )
                    if answer.status_code == 200:
                        break
                    assert answer.status_code == 412, answer.text
                    with lock:
                        num_stale += 1
                with lock:
                    acknowledged.append((path.split("/")[-1], answer.json()["revision"], rate))

    started_s = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(client, number) for number in range(8)]:
            future.result()
    took_s = time.monotonic() - started_s
    print(f"{8 * count} changes in {took_s:.1f} s, {num_stale} were stale and tried again")
    assert len(acknowledged) == 8 * count
    revisions = [revision for _, revision, _ in acknowledged]
    assert len(set(revisions)) == 8 * count
    assert num_stale > 0
    changes = history(running.url)
    written = {one["revision"]: one for one in changes}
    for task, revision, rate in acknowledged:
        assert written[revision]["task"] == task
        assert written[revision]["what"] == {"max_error_rate": rate}
    for task in TASKS:
        last = max((r for t, r, _ in acknowledged if t == task))
        assert get(running.url, task)["max_error_rate"] == written[last]["what"]["max_error_rate"]


def history(url: str) -> list[Any]:
    changes: list[Any] = []
    while True:
        before = f"&before={changes[-1]['revision']}" if changes else ""
        page = httpx2.get(f"{url}/v1/history?limit=1000{before}", timeout=60).json()["changes"]
        if not page:
            return changes
        changes += page


def test_a_killed_catalog_loses_nothing_and_stops_no_prediction(running: Any) -> None:
    acknowledged: dict[str, float] = {}
    for round_number in range(3):
        with Load(running.url) as load:
            victim = catalog_pid(running)
            for count in range(10):
                task = TASKS[count % 4]
                rate = (round_number * 10 + count) / 100
                path = f"{running.url}/v1/tasks/{task}"
                answer = httpx2.patch(path, json={"max_error_rate": rate}, timeout=60)
                assert answer.status_code == 200, answer.text
                acknowledged[task] = rate
            os.kill(victim, signal.SIGKILL)
            refused = httpx2.patch(path, json={"max_error_rate": 0.5}, timeout=60)
            assert refused.status_code in (200, 503), refused.text
            acknowledged.pop(task)  # the last one may have been written, or not
            until_s = time.monotonic() + 60
            while True:
                answer = httpx2.patch(path, json={"max_error_rate": 0.75}, timeout=60)
                if answer.status_code == 200:
                    break
                assert answer.status_code == 503, answer.text
                assert time.monotonic() < until_s
                time.sleep(0.2)
            acknowledged[task] = 0.75
            assert catalog_pid(running) != victim
            time.sleep(1)
        told_latency(load)
        assert_none_failed(load)
        for task, rate in acknowledged.items():
            assert get(running.url, task)["max_error_rate"] == rate


def test_two_clusters_on_one_store_lose_no_change(
    running: Any, a_server: Any, store: Path, make_version: Any
) -> None:
    with a_server() as other:
        start(other, store)
        for task in TASKS:
            assert get(other.url, task)["versions"] == get(running.url, task)["versions"]

        def bring(url: str, seeds: range) -> list[tuple[str, str]]:
            return [(TASKS[seed % 4], upload(url, TASKS[seed % 4], make_version(seed)))
                    for seed in seeds]  # fmt: skip

        with ThreadPoolExecutor(2) as pool:
            ours = pool.submit(bring, running.url, range(1000, 1020))
            theirs = pool.submit(bring, other.url, range(2000, 2020))
            brought = [*ours.result(), *theirs.result()]
        until_s = time.monotonic() + 10
        for url in (running.url, other.url):
            for task, version in brought:
                while version not in get(url, task)["versions"]:
                    assert time.monotonic() < until_s, (url, task, version)
                    time.sleep(0.1)
        assert history(running.url) == history(other.url)
        other.stop(signal.SIGTERM, as_terminal=False)


def test_a_restart_brings_back_tasks_traffic_and_pins_and_answers_the_same(
    running: Any, store: Path
) -> None:
    task = TASKS[0]
    versions = list(get(running.url, task)["versions"])
    active = get(running.url, task)["active"]
    canary = next(version for version in versions if version != active)
    change = {"traffic": {canary: 0.5}, "pinned": True, "rules": {"threshold": 0.6}}
    path = f"{running.url}/v1/tasks/{task}"
    assert httpx2.patch(path, json=change, timeout=60).status_code == 200

    def told() -> Any:
        told = {task: get(running.url, task) for task in TASKS}
        for one in told.values():
            del one["usage"]
        keys = [str(number) for number in range(20)]
        answers = [
            httpx2.post(
                f"{running.url}/v1/tasks/{task}/predict",
                json={"texts": [TEXT], "return_scores": True},
                headers={"x-routing-key": key},
                timeout=60,
            ).json()
            for task in TASKS
            for key in keys
        ]
        for answer in answers:
            del answer["timings_ms"]
        return json.dumps([told, answers])

    before = told()
    running.stop(signal.SIGTERM, as_terminal=False)
    shutil.copy(running.log, running.log.with_suffix(".first"))
    start(running, store)
    assert told() == before
