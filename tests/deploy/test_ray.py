"""Ray's own parsers on what `ray up`, KubeRay and `serve deploy` are given."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("check_with_ray.py")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("where", ["own", "embedded"])
def test_serve_and_the_application_take_the_config(where: str, found: dict[str, Any]) -> None:
    config = found[where]
    assert config["import_path"] == "deployments.app:build"
    assert {"base_model", "adapter_store", "device", "bank_gib"} <= set(config["keys"])
    assert (config["device"], config["gpus"]) == ("cuda", 1)
    assert config["deployments"] == ["Ingress", "Model"]
    assert config["policies"] == ["replicas_for"]
    assert config["port"] == 8000


def test_the_deployments_that_are_named_exist() -> None:
    text = (ROOT / "deployments" / "app.py").read_text()
    assert 'name="Ingress"' in text
    assert 'name="Model"' in text


def test_ray_start_takes_all_arguments(found: dict[str, Any]) -> None:
    starts = found["starts"]
    assert starts["head"]["num_cpus"] == starts["ray up, head"]["num_cpus"] == 0
    assert {start["object_store_memory"] for start in starts.values()} == {2**28}
    for name in ("head", "worker"):
        # KubeRay sets this port by itself.
        assert starts[f"ray up, {name}"]["metrics_export_port"] == 8080
    # KubeRay's operator deploys over the network, `ray exec` on the machine itself.
    assert starts["head"]["dashboard_host"] == "0.0.0.0"
    assert starts["ray up, head"]["dashboard_host"] == "127.0.0.1"


def test_ray_up_takes_the_cluster(found: dict[str, Any]) -> None:
    assert found["workers"] == 2
    assert "worker_start_commands" in found["refused"]  # it is the check that checks


def test_the_commands_are_shell(found: dict[str, Any]) -> None:
    for several in found["commands"].values():
        for command in several:
            done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("node", ["head", "worker"])
def test_ray_starts_with_flags_code_and_secrets(
    node: str, found: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "onebase").symlink_to(ROOT)
    (tmp_path / ".onebase.env").write_text("ONEBASE_ADMIN_TOKEN=hush\n")
    command = found["commands"][f"{node}_start_ray_commands"][-1]
    before, started, _ = command.partition(".venv/bin/ray start")
    assert started
    done = subprocess.run(
        ["bash", "-c", before.replace("ulimit -n 65536", "true") + "env"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    told = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert told["RAY_SERVE_ENABLE_HA_PROXY"] == told["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert told["RAY_AUTH_MODE"] == "token"
    assert told["ONEBASE_ADMIN_TOKEN"] == "hush"
    assert told["PYTHONPATH"] == str(tmp_path / "onebase")
