"""Replicas are spread over two nodes, one is lost with all its processes, and another one comes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests.serve.head import ROOT, free_port, wait_until
from tests.serve.load import Steady

TASKS = ("sentiment", "spam", "topic")
TEXTS = ("I absolutely loved this product!", "Win a prize now")
RATE = 12.0
SPREAD = {"num_replicas": 2, "max_replicas_per_node": 1}


class Nodes:
    """See tests/serve/two_nodes.py."""

    def __init__(self, folder: Path, store: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        application = {
            "name": "onebase",
            "route_prefix": "/",
            "import_path": "deployments.app:build",
            "args": {
                "base_model": str(ROOT / "examples" / "base"),
                "adapter_store": str(store),
                "quantization": "none",
                "num_cpus": 1,
            },
            "deployments": [{"name": "Model", **SPREAD}, {"name": "Ingress", **SPREAD}],
        }
        config = {
            "http_options": {"host": "127.0.0.1", "port": port},
            "applications": [application],
        }
        plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment = {
            **plain,
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._log = (folder / "log").open("w")
        self._main = subprocess.Popen(
            [sys.executable, "-m", "tests.serve.two_nodes", str(folder), json.dumps(config)],
            cwd=ROOT, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True, start_new_session=True,
        )  # fmt: skip
        assert self._answer() == {"ready": True}, (folder / "log").read_text()

    def ask(self, what: str) -> dict[str, Any]:
        assert self._main.stdin is not None
        print(what, file=self._main.stdin, flush=True)
        return self._answer()

    def replicas(self, name: str) -> dict[int, str]:
        """Pid -> node of a deployment's replicas that run."""
        told = self.ask("told")["replicas"]
        return {one["pid"]: one["node"] for one in told if one["name"] == name}

    def stop(self) -> None:
        mine = f"HOME={self.environment['HOME']}".encode()
        while True:
            left = []
            for process in psutil.process_iter():
                with suppress(OSError):
                    path = Path(f"/proc/{process.pid}/environ")
                    if mine in path.read_bytes().split(b"\0"):
                        left.append(process.pid)
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._main.wait(30)
            if not left:
                self._log.close()
                return

    def _answer(self) -> Any:
        assert self._main.stdout is not None
        for line in self._main.stdout:  # Ray prints there too
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError(Path(self._log.name).read_text())


@pytest.fixture
def nodes(short_dir: Path, examples: Path) -> Iterator[Nodes]:
    folder = short_dir / "two"
    store = Path(shutil.copytree(examples, folder / "store"))
    nodes = Nodes(folder, store)
    try:
        yield nodes
    finally:
        nodes.stop()


def tasks(url: str) -> list[dict[str, Any]]:
    names = [task["task"] for task in httpx2.get(f"{url}/v1/tasks", timeout=60).json()["tasks"]]
    told = [httpx2.get(f"{url}/v1/tasks/{name}", timeout=60).json() for name in names]
    for task in told:
        del task["usage"]
    return told


@pytest.mark.slow
def test_a_node_is_lost_and_another_one_takes_its_place(
    nodes: Nodes, examples: Path, oracle: Any
) -> None:
    wanted = {
        (task, text): scores
        for task in TASKS
        for text, scores in zip(TEXTS, oracle.scores(examples / task, TEXTS), strict=True)
    }

    def are_spread() -> bool:
        alive = {node for node, alive in nodes.ask("told")["nodes"].items() if alive}
        return all({*nodes.replicas(name).values()} == alive for name in ("Model", "Ingress"))

    assert are_spread()
    assert len({*nodes.replicas("Model").values()}) == 2
    before = tasks(nodes.url)
    (catalog,) = nodes.replicas("Catalog").values()
    with Steady(nodes.url, wanted, RATE) as load:
        time.sleep(2)
        lost_s = time.monotonic()
        lost = nodes.ask("lose")
        print(f"killed {lost['processes']} processes; the catalog was", catalog == lost["lost"])
        wait_until(
            lambda: len(nodes.replicas("Model")) == 1 and len(nodes.replicas("Catalog")) == 1
        )
        print(f"one replica each after {time.monotonic() - lost_s:.1f} s;", load.told(lost_s))
        nodes.ask("add")
        wait_until(lambda: len(nodes.replicas("Model")) == 2 and are_spread())
        settled_s = time.monotonic()
        time.sleep(3)
    print(f"two each after {settled_s - lost_s:.1f} s;", load.told(lost_s))
    assert not [one for one in load.failed if one.due_s > settled_s]
    assert tasks(nodes.url) == before
