"""A running server's catalog when an ingress, the store or a version fails.

One server for all, with HAProxy: two applications on one store, of which the second goes on when it
is out of contact. Two adapters have room in slots, and none in host RAM: what others push out is
read again.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

TEXT = "I absolutely loved this product!"


class Running:
    """The server, and its parts one by one."""

    def __init__(self, server: Any, store: Path) -> None:
        self.server, self.store = server, store
        self.url = server.url

    def pids(self, name: str) -> list[int]:
        """Processes of an application's deployment."""
        mark = f"ServeReplica:{name}"
        return sorted(p for p, line in self.server.processes().items() if mark in line)

    def port(self, pid: int) -> str:
        """The URL at which one ingress itself listens."""
        for one in psutil.Process(pid).net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN:
                url = f"http://127.0.0.1:{one.laddr.port}"
                try:
                    if httpx2.get(f"{url}/v1/tasks", timeout=2).status_code == 200:
                        return url
                except httpx2.HTTPError:
                    continue
        raise AssertionError(f"{pid} listens nowhere")

    def upload(self, task: str, files: list[Any], **query: Any) -> str:
        path = f"{self.url}/v1/tasks/{task}/versions"
        answer = httpx2.put(path, files=files, params=query, timeout=60)
        assert answer.status_code in (200, 201), answer.text
        return str(answer.json()["version"])

    def patch(self, task: str, **change: Any) -> httpx2.Response:
        return httpx2.patch(f"{self.url}/v1/tasks/{task}", json=change, timeout=60)

    def predict(self, task: str, url: str = "") -> httpx2.Response:
        path = f"{url or self.url}/v1/tasks/{task}/predict"
        return httpx2.post(path, json={"texts": [TEXT]}, timeout=30)

    def breaks(self, task: str, version: str) -> None:
        """Spoil a version's files, and push it out of its slot."""
        weights = self.store / task / version / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
        for other in ("push-1", "push-2"):
            assert self.predict(other).status_code == 200


@pytest.fixture(scope="module")
def make_files(make_adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns the files of a random adapter of two labels; another seed is another version."""
    from safetensors.torch import load, save

    made = make_adapter(tmp_path_factory.mktemp("made") / "one")
    weights = load((made / "adapter_model.safetensors").read_bytes())
    config = (made / "adapter_config.json").read_bytes()

    def make(seed: int) -> list[Any]:
        changed = {name: tensor.clone() for name, tensor in weights.items()}
        next(iter(changed.values())).view(-1)[0] = float(seed + 1)
        return [
            ("files", ("adapter_config.json", config)),
            ("files", ("adapter_model.safetensors", save(changed))),
        ]

    return make


@pytest.fixture(scope="module")
def running(
    a_server: Any, make_files: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    store = tmp_path_factory.mktemp("faults") / "store"
    store.mkdir()
    no_cpus = {"ray_actor_options": {"num_cpus": 0}}
    deployments = [
        {"name": "Ingress", "num_replicas": 2, **no_cpus},
        {"name": "Model", **no_cpus},
    ]
    args = {"adapter_store": str(store), "quantization": "none", "num_cpus": 1}
    with a_server() as server:
        path = Path(
            server.write_config(deployments=deployments, **args, adapter_slots=2, max_host_gib=1e-9)
        )
        config = json.loads(path.read_text())
        (strict,) = config["applications"]
        lenient = {
            **strict,
            "name": "lenient",
            "route_prefix": "/lenient",
            "args": {**strict["args"], "on_lost_catalog": "serve"},
            "deployments": [{"name": "Ingress", **no_cpus}, deployments[1]],
        }
        path.write_text(json.dumps({**config, "applications": [strict, lenient]}))
        server.start("-m", "deployments", str(path))
        server.wait_until(lambda: "ready" in server.log.read_text())
        server.wait_until(server.answers)
        running = Running(server, store)
        for seed, task in enumerate(("push-1", "push-2")):
            running.upload(task, make_files(seed))
        yield running


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def wait_for(happened: Callable[[], bool], within_s: float = 30.0) -> float:
    started_s = time.monotonic()
    while not happened():
        assert time.monotonic() - started_s < within_s, "it never happened"
        time.sleep(0.05)
    return time.monotonic() - started_s


def test_a_change_that_an_ingress_does_not_confirm_is_answered_202_with_a_link(
    running: Running, make_files: Any
) -> None:
    running.upload("linked", make_files(10))
    alive, still = running.pids("onebase:Ingress")
    url = running.port(alive)
    with stopped(still):
        started_s = time.monotonic()
        answer = httpx2.patch(f"{url}/v1/tasks/linked", json={"max_error_rate": 0.5}, timeout=30)
        took_s = time.monotonic() - started_s
        assert answer.status_code == 202, answer.text
        assert 4.5 < took_s < 9
        assert answer.json()["everywhere"] is False
        link = answer.headers["location"]
        told = httpx2.get(f"{url}{link}", timeout=30).json()
        assert told["everywhere"] is False
        assert len(told["waiting_for"]) == 1
    print(f"confirmed {wait_for(lambda: everywhere(f'{url}{link}')):.2f} s later")
    assert running.patch("linked", max_error_rate=0.25).status_code == 200


def everywhere(url: str) -> bool:
    return bool(httpx2.get(url, timeout=30).json()["everywhere"])


def test_a_killed_ingress_holds_no_change_up(running: Running, make_files: Any) -> None:
    running.upload("held-up", make_files(11))
    alive, victim = running.pids("onebase:Ingress")
    url = running.port(alive)
    os.kill(victim, signal.SIGKILL)
    started_s = time.monotonic()
    answer = httpx2.patch(f"{url}/v1/tasks/held-up", json={"max_error_rate": 0.5}, timeout=30)
    print(f"answered {time.monotonic() - started_s:.2f} s after an ingress was killed")
    assert answer.status_code == 200, answer.text
    # The one that takes its place has never been waited for: its first answer is the newest.
    wait_for(lambda: len({alive, *running.pids("onebase:Ingress")}) == 2, 60)
    (fresh,) = {*running.pids("onebase:Ingress")} - {alive}
    wait_for(lambda: listens(running, fresh), 60)
    told = httpx2.get(f"{running.port(fresh)}/v1/tasks/held-up", timeout=30).json()
    assert told["max_error_rate"] == 0.5


def listens(running: Running, pid: int) -> bool:
    try:
        return bool(running.port(pid))
    except (AssertionError, psutil.NoSuchProcess):
        return False


def test_out_of_contact_an_ingress_refuses_or_says_so_as_it_was_told(
    running: Running, make_files: Any
) -> None:
    running.upload("contact", make_files(12))
    wait_for(lambda: running.predict("contact", f"{running.url}/lenient").status_code == 200)
    catalog, away = running.store / "catalog", running.store.parent / "away"
    catalogs = [*running.pids("onebase:Catalog"), *running.pids("lenient:Catalog")]
    assert len(catalogs) == 2
    with stopped(*catalogs):
        catalog.rename(away)
        catalog.write_text("what stands here is no folder")
        try:
            # An ingress each, whose last polls were answered up to 2 s apart.
            took_s = wait_for(lambda: running.predict("contact").status_code == 503)
            print(f"refused after {took_s:.1f} s")
            assert 2.5 < took_s < 12  # a poll may have been answered 2 s before
            answers = [running.predict("contact") for _ in range(8)]
            refused = [answer for answer in answers if answer.status_code == 503]
            assert refused
            for answer in refused:
                assert "has not reached the catalog or the store" in answer.json()["detail"]

            def says_so() -> bool:
                answer = running.predict("contact", f"{running.url}/lenient")
                assert answer.status_code == 200, answer.text
                return bool(answer.json().get("stale_s", 0) >= 5)

            print(f"and said so {wait_for(says_so, 5):.1f} s later")
            wait_for(lambda: all(running.predict("contact").status_code == 503 for _ in "1234"), 5)
        finally:
            catalog.unlink()
            away.rename(catalog)
    wait_for(lambda: running.predict("contact").status_code == 200)
    wait_for(lambda: "stale_s" not in running.predict("contact", f"{running.url}/lenient").json())
    assert running.patch("contact", max_error_rate=0.5).status_code == 200


def test_a_fallback_answers_and_names_itself_and_without_one_the_task_is_closed(
    running: Running, make_files: Any
) -> None:
    first = running.upload("falls", make_files(13))
    second = running.upload("falls", make_files(14), activate=True)
    assert running.patch("falls", fallback=first).status_code == 200
    assert running.predict("falls").json()["version"] == second
    running.breaks("falls", second)
    answer = running.predict("falls")
    assert answer.status_code == 200, answer.text
    assert (answer.json()["version"], answer.json()["fallback_for"]) == (first, second)
    # What needs no version to be loaded can be changed, and then nothing answers in its place.
    assert running.patch("falls", fallback=None).status_code == 200
    closed = running.predict("falls")
    assert closed.status_code == 503, closed.text
    assert "falls" in closed.json()["detail"]
    rollback = httpx2.post(f"{running.url}/v1/tasks/falls/rollback", timeout=60)
    assert rollback.status_code == 200, rollback.text
    assert running.predict("falls").json()["version"] == first


def test_a_canary_that_fails_loses_its_share_and_the_history_says_why(
    running: Running, make_files: Any
) -> None:
    first = running.upload("canary", make_files(15))
    second = running.upload("canary", make_files(16))
    change = {"traffic": {second: 0.5}, "max_error_rate": 0.1, "fallback": first}
    # A fallback to the active version itself is refused, so what the canary fails at is an error.
    assert running.patch("canary", **change).status_code == 422
    del change["fallback"]
    assert running.patch("canary", **change).status_code == 200
    running.breaks("canary", second)
    seen = {200: 0, 503: 0}

    def returned() -> bool:
        with ThreadPoolExecutor(8) as pool:
            for answer in pool.map(running.predict, ["canary"] * 8):
                seen[answer.status_code] += 1
        told = httpx2.get(f"{running.url}/v1/tasks/canary", timeout=30).json()
        return told["traffic"] == {first: 1.0} or not told["traffic"]

    print(f"traffic returned after {wait_for(returned):.1f} s, {seen}")
    assert seen[503] >= 10
    assert {running.predict("canary").json()["version"] for _ in range(6)} == {first}
    told = httpx2.get(f"{running.url}/v1/history?task=canary", timeout=30).json()["changes"]
    assert told[0]["by"] == "guard"
    assert told[0]["what"]["returned"] == second
    assert "over max_error_rate 0.1" in told[0]["what"]["reason"]


def test_what_has_no_room_in_slots_is_not_pinned(
    running: Running, make_files: Any, assert_problem: Any
) -> None:
    first = running.upload("pinned", make_files(17))
    second = running.upload("pinned", make_files(18))
    assert running.patch("push-1", pinned=True).status_code == 200
    assert running.patch("pinned", traffic={second: 0.5}).status_code == 200
    before = httpx2.get(f"{running.url}/v1/tasks/pinned", timeout=30)
    refused = running.patch("pinned", pinned=True)
    assert_problem(refused, 503, "no room", "pinned@", "raise bank_gib or adapter_slots")
    after = httpx2.get(f"{running.url}/v1/tasks/pinned", timeout=30)
    assert after.headers["etag"] == before.headers["etag"]
    assert after.json()["pinned"] is False
    assert running.patch("pinned", traffic={}).status_code == 200
    assert running.patch("pinned", pinned=True).status_code == 200
    assert running.predict("pinned").json()["version"] == first
    for task in ("pinned", "push-1"):
        assert running.patch(task, pinned=False).status_code == 200
