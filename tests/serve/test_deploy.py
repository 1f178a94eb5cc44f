"""`serve deploy serve_config.yaml` on a head node that `ray start` has started, as in a cluster."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TEXT = "I absolutely loved this product!"
PATIENCE_S = 120.0  # on a busy machine


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_until(true: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.5)


class Head:
    """A head node with a dashboard, a token and nothing in common with other clusters here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._dashboard = free_port()
        plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment = {
            **plain,
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "a token for one test only",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        ports = {
            "--port": free_port(),
            "--dashboard-port": self._dashboard,
            "--dashboard-agent-listen-port": free_port(),
            "--metrics-export-port": free_port(),
            "--ray-client-server-port": free_port(),
        }
        self.log = folder / "head.log"
        with self.log.open("w") as log:
            self._main = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
                 "--num-cpus=4", f"--temp-dir={folder / 'ray'}", f"--object-store-memory={2**27}",
                 *(f"{name}={port}" for name, port in ports.items())],
                cwd=ROOT, env=self.environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def serve(self, *arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = self.environment | ({"RAY_AUTH_TOKEN": token} if token else {})
        return subprocess.run(
            [sys.executable, "-m", "ray.serve.scripts", *arguments,
             "-a", f"http://127.0.0.1:{self._dashboard}"],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip

    def deploy(self, **args: Any) -> None:
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        config["http_options"]["port"] = self.port
        config["applications"][0]["args"] |= args
        path = self.folder / "serve_config.yaml"
        path.write_text(yaml.safe_dump(config))
        wait_until(lambda: self.serve("deploy", str(path)).returncode == 0)

    def application(self) -> dict[str, Any]:
        told = self.serve("status").stdout
        return (yaml.safe_load(told) or {}).get("applications", {}).get("onebase", {})

    def predict(self) -> httpx2.Response:
        url = f"http://127.0.0.1:{self.port}/v1/tasks/sentiment/predict"
        return httpx2.post(url, json={"texts": [TEXT]}, timeout=60)

    def stop(self) -> None:
        """End this node's processes, and no others, as `ray stop` would."""
        while left := self._processes():
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self._main.wait(30)

    def _processes(self) -> list[int]:
        mine = f"HOME={self.folder}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mine in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found


@pytest.fixture
def head(short_dir: Path) -> Iterator[Head]:
    folder = short_dir / "head"
    folder.mkdir()
    node = Head(folder)
    try:
        yield node
    finally:
        node.stop()


@pytest.mark.slow
def test_the_example_is_deployed_to_a_running_cluster(head: Head) -> None:
    head.deploy(quantization="none")
    wait_until(lambda: head.application().get("status") == "RUNNING")
    (result,) = head.predict().json()["results"]
    assert result["prediction"] == "Positive"
    refused = head.serve("status", token="another")
    assert refused.returncode != 0
    assert re.search("40[13]|[Aa]uthentication", refused.stdout + refused.stderr)
    # A wrong change costs nothing but itself.
    head.deploy(quantization="int3")
    wait_until(lambda: head.application().get("status") == "DEPLOY_FAILED")
    assert "quantization='int3' is wrong" in head.application()["message"]
    assert head.predict().status_code == 200
