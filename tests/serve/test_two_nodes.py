"""Replicas are spread over two nodes, one is lost with all its processes, and another one comes."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.servers import free_port
from tests.serve.head import ROOT, end, tasks, wait_until
from tests.serve.load import Steady

TASKS = ("sentiment", "spam", "topic")
TEXTS = ("I absolutely loved this product!", "Win a prize now")
RATE = 12.0
ALL = ("Model", "Ingress", "Catalog")
SPREAD = {"num_replicas": 2, "max_replicas_per_node": 1}


class Nodes:
    """See tests/serve/two_nodes.py."""

    def __init__(self, folder: Path, store: Path) -> None:
        self._home, port = folder, free_port()
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
        environment = {
            **plain,
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._log = (folder / "log").open("w")
        self._main = subprocess.Popen(
            [sys.executable, "-m", "tests.serve.two_nodes", str(folder), json.dumps(config)],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True, start_new_session=True,
        )  # fmt: skip

    def wait(self) -> None:
        """Wait until the application runs."""
        assert self._answer() == {"ready": True}

    def ask(self, what: str) -> dict[str, Any]:
        assert self._main.stdin is not None
        print(what, file=self._main.stdin, flush=True)
        return self._answer()

    def replicas(self, name: str) -> dict[int, str]:
        """Pid -> node of a deployment's replicas that run."""
        told = self.ask("told")["replicas"]
        return {one["pid"]: one["node"] for one in told if one["name"] == name}

    def stop(self) -> None:
        end(self._home, self._main)
        for pipe in (self._main.stdin, self._main.stdout, self._log):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

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
        nodes.wait()
        yield nodes
    finally:
        nodes.stop()


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
    head = nodes.ask("told")["head"]
    print("the catalog is on the node that stays:", {*nodes.replicas("Catalog").values()} == {head})
    with Steady(nodes.url, wanted, RATE) as load:
        time.sleep(2)
        on_second = [
            pid for name in ALL for pid, node in nodes.replicas(name).items() if node != head
        ]
        lost_s = time.monotonic()
        lost = nodes.ask("lose")
        assert {*on_second} <= {*lost["killed"]}
        wait_until(lambda: all({*nodes.replicas(name).values()} == {head} for name in ALL))
        print(f"one replica each after {time.monotonic() - lost_s:.1f} s;", load.told(lost_s))
        nodes.ask("add")
        wait_until(lambda: len(nodes.replicas("Model")) == 2 and are_spread())
        settled_s = time.monotonic()
        time.sleep(3)
    print(f"two each after {settled_s - lost_s:.1f} s;", load.told(lost_s))
    # Those that the lost node had; who comes later is answered by the other one.
    assert all(lost_s - 1 < one.due_s < lost_s + 2 for one in load.failed)
    assert len(load.failed) <= RATE
    assert tasks(nodes.url) == before
