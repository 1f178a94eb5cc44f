"""The private names of Ray Serve that deployments/internals.py uses, against the installed Ray."""

import json
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.servers import free_port
from deployments.internals import is_encrypted, last_cluster_is_dead

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.2"  # neither Serve's default nor what other tests configure

ASK = """
import json, sys
import ray
from ray import serve
from ray.serve.context import _get_global_client
from deployments.internals import bind_host, is_dead, running_replicas

class Asked:
    def __call__(self):
        return bind_host()

    async def others(self):
        own = serve.get_replica_context().replica_id.unique_id
        running = await running_replicas("asked", "Asked")
        dead = [await is_dead(running[own]), await is_dead(running[own] + "0")]
        return own, [*running], dead, await running_replicas("asked", "nobody")

host, port, folder = sys.argv[1:]
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False,
         configure_logging=False, object_store_memory=100 * 2**20, _temp_dir=folder)
serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": int(port)})
handle = serve.run(serve.deployment(Asked).bind(), name="asked", route_prefix=None)
own, running, dead, nobody = handle.others.remote().result()
assert running == [own], (running, own)
assert dead == [False, True], dead
assert nobody is None, nobody
print(json.dumps({
    "driver": bind_host(),
    "replica": handle.remote().result(),
    "client": _get_global_client().http_config.host,
}))
serve.shutdown()
ray.shutdown()
"""


def test_the_private_names_are_those_of_the_ray_that_is_installed() -> None:
    """Whoever raises Ray reads deployments/internals.py, and then this number."""
    assert version("ray").split(".")[:2] == ["2", "60"]


def test_the_host_and_the_replicas_are_what_serve_knows(short_dir: Path) -> None:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment = {**plain, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", ASK, HOST, str(free_port()), str(short_dir / "internals")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Ray says things there too.
    (told,) = [line for line in done.stdout.splitlines() if line.startswith('{"driver"')]
    assert json.loads(told) == dict.fromkeys(("driver", "replica", "client"), HOST)


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Ray notes this machine's last cluster, for this test alone."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_a_last_cluster_that_was_killed_is_known_by_its_silence(note: Path) -> None:
    assert not last_cluster_is_dead()  # there was none
    with socket.create_server(("127.0.0.1", 0)) as listening:
        note.write_text(f"127.0.0.1:{listening.getsockname()[1]}")
        assert not last_cluster_is_dead()
    assert last_cluster_is_dead()


@pytest.mark.parametrize("said", ["192.0.2.1:6379", "the note's"])
def test_a_cluster_that_was_named_is_never_replaced_by_a_new_one(
    note: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    address = f"127.0.0.1:{free_port()}"
    note.write_text(address)
    monkeypatch.setenv("RAY_ADDRESS", address if said == "the note's" else said)
    assert not last_cluster_is_dead()


@pytest.mark.parametrize(
    ("said", "encrypted"), [(None, False), ("0", False), ("1", True), ("true", True)]
)
def test_that_ray_encrypts_is_known(
    monkeypatch: pytest.MonkeyPatch, said: str | None, encrypted: bool
) -> None:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    if said is not None:
        monkeypatch.setenv("RAY_USE_TLS", said)
    assert is_encrypted() == encrypted
