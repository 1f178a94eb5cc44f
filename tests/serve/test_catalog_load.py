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
    planned_s: float
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
    took_s: float = 0.0
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
            began_s = next_s = time.monotonic()
            while not self._ending.is_set():
                pool.submit(self._ask, http, rng.choice(TASKS), next_s)
                next_s += 1 / self.rate
                time.sleep(max(0.0, next_s - time.monotonic()))
        self.took_s = next_s - began_s

    def _ask(self, http: httpx2.Client, task: str, planned_s: float) -> None:
        sent_s = time.monotonic()
        try:
            response = http.post(f"/v1/tasks/{task}/predict", json={"texts": [TEXT]})
            status, said = response.status_code, response.json()
        except (httpx2.TransportError, ValueError) as error:
            status, said = 0, repr(error)
        self.answers.append(Answer(task, planned_s, sent_s, time.monotonic(), status, said))


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


def assert_steady(load: Load) -> None:
    """The rate was held: all that was planned was sent and answered, and nearly all in time."""
    assert len(load.answers) == round(load.rate * load.took_s)
    late_s = sorted(answer.sent_s - answer.planned_s for answer in load.answers)
    in_time = sum(late < 0.1 for late in late_s) / len(late_s)
    print(f"{in_time:.1%} of {len(late_s)} sent within 0.1 s of their time, all {late_s[-1]:.2f} s")
    assert in_time > 0.9


def told_latency(load: Load) -> float:
    """Prints how long predictions took; returns the 99th percentile in ms."""
    took_ms = sorted(1e3 * (answer.got_s - answer.sent_s) for answer in load.answers)
    print(
        f"{len(took_ms)} predictions: p50 {took_ms[len(took_ms) // 2]:.0f} ms, "
        f"p99 {took_ms[int(len(took_ms) * 0.99)]:.0f} ms, longest {took_ms[-1]:.0f} ms"
    )
    return took_ms[int(len(took_ms) * 0.99)]


@pytest.mark.slow  # the minute of soak has fewer changes under less load
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
    assert_steady(load)
    assert len({answer.said["version"] for answer in load.answers}) > 10
    for answer in load.answers:
        assert answer.said["version"] in changer.allowed(answer), answer
    assert set(changer.counts) == {"upload", "activate", "split", "rollback", "delete"}


@pytest.mark.slow  # as tests/catalog/test_two_clusters.py has it, but over HTTP
@pytest.mark.parametrize("count", [25, 200])
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


@dataclass
class Stream:
    """Changes to one task without a pause, each of two fields that nobody may see apart.

    `last` was acknowledged, and of `unsure` nobody knows: they were sent after it.
    """

    url: str
    task: str
    acknowledged: dict[int, float] = field(default_factory=dict)  # revision -> what was written
    last: float | None = None
    unsure: list[float] = field(default_factory=list)
    num_unsure: int = 0

    def run(self, number: int, ending: threading.Event) -> None:
        with httpx2.Client(base_url=self.url, timeout=60) as http:
            count = 0
            while not ending.is_set():
                count += 1
                self._change(http, (4 * count + number) / 1e6)  # nobody else's

    def _change(self, http: httpx2.Client, value: float) -> None:
        change = {"max_error_rate": value, "rules": {"threshold": value}}
        answer = http.patch(f"/v1/tasks/{self.task}", json=change)
        assert answer.status_code in (200, 202, 503), answer.text
        if answer.status_code == 503:
            self.unsure.append(value)
            self.num_unsure += 1
            time.sleep(0.1)
        else:
            self.acknowledged[answer.json()["revision"]] = self.last = value
            self.unsure = []
        if answer.status_code != 202:
            self.check(http.get(f"/v1/tasks/{self.task}").json())

    def check(self, told: Any) -> None:
        seen = told["max_error_rate"]
        assert told["overrides"]["threshold"] == seen, "half of a change"
        assert self.last is None or seen in (self.last, *self.unsure), (seen, self)


@pytest.mark.slow
def test_a_catalog_that_is_killed_under_a_stream_of_changes_loses_none(running: Any) -> None:
    streams = [Stream(running.url, task) for task in TASKS]
    ending, rng = threading.Event(), random.Random(7)
    first = {"max_error_rate": 0.0, "rules": {"threshold": 0.0}}
    for task in TASKS:
        path = f"{running.url}/v1/tasks/{task}"
        assert httpx2.patch(path, json=first, timeout=60).status_code == 200

    def num_acknowledged() -> int:
        return sum(len(stream.acknowledged) for stream in streams)

    with Load(running.url) as load, ThreadPoolExecutor(4) as pool:
        done = [pool.submit(one.run, number, ending) for number, one in enumerate(streams)]
        try:
            for _ in range(3):
                victim, before = catalog_pid(running), num_acknowledged()
                until_s = time.monotonic() + 90
                while num_acknowledged() < before + 20:
                    assert time.monotonic() < until_s, "no change is made any more"
                    assert not any(future.done() for future in done), done
                    time.sleep(0.01)
                time.sleep(rng.random() / 10)  # anywhere in a change
                os.kill(victim, signal.SIGKILL)
                while running.processes().get(victim):
                    time.sleep(0.01)
                running.wait_until(lambda: num_pids(running, "Catalog") == 1)
            before = num_acknowledged()
            running.wait_until(lambda: num_acknowledged() >= before + 20)
        finally:
            ending.set()
        for future in done:
            future.result()
    told_latency(load)
    assert_none_failed(load)
    num_unsure = sum(stream.num_unsure for stream in streams)
    print(f"{num_acknowledged()} changes acknowledged, {num_unsure} not")
    assert num_unsure >= 3, "each kill met changes on their way"
    changes = {one["revision"]: one for one in history(running.url)}
    assert sorted(changes) == list(range(1, max(changes) + 1))
    for stream in streams:
        stream.check(get(running.url, stream.task))
        for revision, value in stream.acknowledged.items():
            assert changes[revision]["task"] == stream.task
            assert changes[revision]["what"]["max_error_rate"] == value
        back = {"max_error_rate": None, "rules": {"threshold": None}}
        path = f"{running.url}/v1/tasks/{stream.task}"
        assert httpx2.patch(path, json=back, timeout=60).status_code == 200


def num_pids(server: Any, name: str) -> int:
    return sum(f"ServeReplica:onebase:{name}" in line for line in server.processes().values())


# In CI two processes without Ray do the same: tests/catalog/test_two_clusters.py.
@pytest.mark.slow
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
        race(running.url, other.url, store, make_version)
        other.stop(signal.SIGTERM, as_terminal=False)


def race(url: str, other_url: str, store: Path, make_version: Any) -> None:
    """Both clusters upload, delete, patch and roll back; the little there is to upload comes again
    and again, while both purge what was deleted."""

    def client(url: str, number: int) -> list[Any]:
        rng, acknowledged = random.Random(number), []
        with httpx2.Client(base_url=url, timeout=60) as http:
            for index in range(40):
                task = rng.choice(TASKS[:2])
                path = f"/v1/tasks/{task}"
                read = http.get(path)
                told = read.json()
                headers = {"if-match": read.headers["etag"]} if rng.random() < 0.5 else {}
                some = rng.choice([*told["versions"]])
                kind = rng.choice(("upload", "delete", "patch", "rollback"))
                if kind == "upload":
                    files = make_version(5000 + rng.randrange(4))
                    answer = http.put(f"{path}/versions", files=files, headers=headers)
                elif kind == "delete":
                    answer = http.delete(f"{path}/versions/{some}", headers=headers)
                elif kind == "rollback":
                    answer = http.post(f"{path}/rollback", headers=headers)
                else:
                    rate = (number * 40 + index) / 1000  # nobody else's
                    change = {"active": some, "max_error_rate": rate}
                    answer = http.patch(path, json=change, headers=headers)
                # Gone, in use, overtaken, being deleted: of two that race one may be refused.
                assert answer.status_code in (200, 201, 404, 409, 412, 422, 503), answer.text
                if answer.status_code in (200, 201):
                    acknowledged.append((kind, task, some, headers, answer.json()))
                time.sleep(rng.random() * 0.2)
        return acknowledged

    with ThreadPoolExecutor(4) as pool:
        urls = (url, other_url, url, other_url)
        done = [pool.submit(client, url, number) for number, url in enumerate(urls)]
        acknowledged = [one for future in done for one in future.result()]
    print({kind: sum(one[0] == kind for one in acknowledged) for kind in ("upload", "delete",
           "patch", "rollback")})  # fmt: skip
    until_s = time.monotonic() + 60
    while history(url) != history(other_url) or doomed(url):
        assert time.monotonic() < until_s, "they never agree, or never purge"
        time.sleep(0.2)
    changes = {one["revision"]: one for one in history(url)}
    assert sorted(changes) == list(range(1, max(changes) + 1))
    assert any("purged" in one["what"] for one in changes.values())
    for kind, task, some, headers, told in acknowledged:
        change = changes[told["revision"]]
        assert change["task"] == task
        if kind == "upload":
            assert not told["created"] or change["what"]["publish"] == told["version"]
            continue  # one that was there is no change, and says when the task last changed
        expected = {"delete": {"delete": some}, "rollback": {"rollback": True}}.get(kind)
        assert change["what"] == expected or change["what"].get("active") == some
        if headers:
            assert f'"{change["was"]}"' == headers["if-match"]
    for task in TASKS:
        told = get(url, task)
        while told != {**get(other_url, task), "usage": told["usage"]}:
            assert time.monotonic() < until_s, "they never agree"
            time.sleep(0.1)
            told = get(url, task)
        on_disk = {path.name for path in (store / task).iterdir()}
        assert on_disk == set(told["versions"])
        path = f"{url}/v1/tasks/{task}"
        for version in told["versions"]:
            # All of it: a share that an earlier change gave to another version still holds.
            change = {"active": version, "traffic": {}}
            answer = httpx2.patch(path, json=change, timeout=60)
            assert answer.status_code == 200, answer.text
            answer = httpx2.post(f"{path}/predict", json={"texts": [TEXT]}, timeout=60)
            assert answer.json()["version"] == version


def doomed(url: str) -> bool:
    """Tell whether something that was deleted is not purged yet."""
    going: set[tuple[str, str]] = set()
    for one in reversed(history(url)):
        if "delete" in one["what"]:
            going.add((one["task"], one["what"]["delete"]))
        going.discard((one["task"], one["what"].get("purged", "")))
    return bool(going)


@pytest.mark.slow
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
