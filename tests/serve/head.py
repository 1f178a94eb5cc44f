"""A head node that `ray start` has started, and what `serve deploy` makes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import yaml

from benchmarks.servers import FAST, free_port, haproxy

ROOT = Path(__file__).resolve().parents[2]
TEXT = "I absolutely loved this product!"
PATIENCE_S = 120.0  # on a busy machine
TOKEN = "a token for one test only"


def wait_until(true: Callable[[], bool], *, every_s: float = 0.5) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end_s
        time.sleep(every_s)


def tasks(url: str) -> list[dict[str, Any]]:
    """All that an application says of its tasks, but for what was counted since it started."""
    with httpx2.Client(base_url=url, timeout=60) as client:
        names = [task["task"] for task in client.get("/v1/tasks").json()["tasks"]]
        told = [client.get(f"/v1/tasks/{name}").json() for name in names]
    for task in told:
        del task["usage"]
    return told


def fast_path(home: Path) -> dict[str, str]:
    """HAProxy and throughput mode, with ports and paths that disturb no other server here."""
    return {**FAST, **haproxy(home), "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2"}


def started_from(home: Path) -> list[int]:
    """Pids of all processes that run below one, known by the HOME that it was given."""
    mine = f"HOME={home}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mine in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def end(home: Path, main: subprocess.Popen[Any]) -> None:
    """Kill a process and all below it."""
    while left := started_from(home):
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        main.wait(30)


class Head:
    """A head node with a dashboard, a token and nothing in common with other clusters here."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._dashboard = free_port()
        plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment = {
            **plain,
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            **(environment or {}),
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
                 "--num-cpus=8", f"--temp-dir={folder / 'ray'}", f"--object-store-memory={2**27}",
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

    def deploy(
        self,
        deployments: Sequence[dict[str, Any]] = (),
        import_path: str = "deployments.app:build",
        **args: Any,
    ) -> None:
        """Deploy the example with other `args`, and with `deployments:`."""
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        config["http_options"]["port"] = self.port
        config["applications"][0]["args"] |= args
        config["applications"][0] |= {"import_path": import_path, "deployments": list(deployments)}
        path = self.folder / "serve_config.yaml"
        path.write_text(yaml.safe_dump(config))
        wait_until(lambda: self.serve("deploy", str(path)).returncode == 0)

    def application(self) -> dict[str, Any]:
        told = self.serve("status").stdout
        return (yaml.safe_load(told) or {}).get("applications", {}).get("onebase", {})

    def told(self) -> dict[str, Any]:
        """What the dashboard's REST says of Serve; empty while it, or the controller, is away."""
        url = f"http://127.0.0.1:{self._dashboard}/api/serve/applications/"
        try:
            response = httpx2.get(url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20)
        except httpx2.TransportError:
            return {}
        return response.json() if response.status_code == 200 else {}

    def deployment(self, name: str) -> dict[str, Any]:
        """What it says of a deployment, with all its replicas."""
        application = self.told().get("applications", {}).get("onebase", {})
        return application.get("deployments", {}).get(name, {})

    def running(self, name: str) -> list[int]:
        """Pids of a deployment's replicas that take traffic."""
        replicas = self.deployment(name).get("replicas", [])
        return sorted(one["pid"] for one in replicas if one["state"] == "RUNNING")

    def pids(self, title: str) -> list[int]:
        """Pids of this node's processes whose command line has a word."""
        found = []
        for pid in started_from(self.folder):
            with suppress(OSError):
                if title.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def predict(self) -> httpx2.Response:
        url = f"{self.url}/v1/tasks/sentiment/predict"
        return httpx2.post(url, json={"texts": [TEXT]}, timeout=60)

    def answers(self) -> bool:
        try:
            return self.predict().status_code == 200
        except httpx2.TransportError:
            return False

    def stop(self) -> None:
        """End this node's processes, and no others, as `ray stop` would."""
        end(self.folder, self._main)
