"""Both ways to start, as real processes with HAProxy and throughput mode, and how they end."""

import ast
import resource
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from benchmarks.servers import free_port
from deployments.run import connections

ROOT = Path(__file__).resolve().parents[2]
STOP_S = 10.0
DIRECT_INGRESS = range(30000, 31000)  # Serve's, for HTTP to a replica itself
TEXTS = ["I absolutely loved this product!"]

# `serve run` without a file listens on 8000 and has no option for it.
SERVE_RUN = """
import sys
from ray.serve.config import HTTPOptions
HTTPOptions.model_fields["port"].default = int(sys.argv.pop(1))
HTTPOptions.model_rebuild(force=True)
sys.path[0] = sys.prefix + "/bin"  # as for the script of that name
from ray.serve.scripts import cli
cli()
"""


def ask(server: Any, task: str) -> dict[str, Any]:
    response = httpx2.post(
        f"{server.url}/v1/tasks/{task}/predict",
        json={"texts": TEXTS, "return_scores": True},
        timeout=60,
    )
    assert response.status_code == 200, response.text
    return response.json()


def listeners(server: Any) -> dict[int, set[str]]:
    """TCP port -> addresses that the server's processes listen on."""
    found: dict[int, set[str]] = {}
    for pid in server.processes():
        with suppress(psutil.NoSuchProcess):
            for one in psutil.Process(pid).net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN:
                    found.setdefault(one.laddr.port, set()).add(one.laddr.ip)
    return found


def assert_the_handle_answers(server: Any, run_example: Any) -> None:
    secrets = {k: server.environment[k] for k in ("HOME", "RAY_AUTH_MODE")}
    done = run_example(server.home, server.address(), "spam", *TEXTS, **secrets)
    assert done.returncode == 0, done.stderr
    ours = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert ours["results"] == ask(server, "spam")["results"]


@pytest.fixture
def store(examples: Path, make_adapter: Any, tmp_path: Path) -> Path:
    """A copy of the examples' store and an adapter over the geometry that the tests configure."""
    shutil.copytree(examples, tmp_path / "store")
    make_adapter(tmp_path / "store" / "large", rank=64, labels=7, targets=("query", "key"))
    return tmp_path / "store"


@pytest.mark.slow  # the other way to start, which it shares all but the command with
def test_serve_run_takes_typed_arguments_and_ends_with_ctrl_c(
    server: Any, store: Path, oracle: Any, run_example: Any
) -> None:
    server.start(
        "-c", SERVE_RUN, str(server.port), "run", "deployments.app:build", "--name", "onebase",
        "base_model=examples/base", f"adapter_store={store}", "quantization=none",
        "adapter_slots=3", "bank_gib=0.002",
    )  # fmt: skip
    server.wait_until(server.answers)
    assert len({process.split()[-1] for process in server.processes().values()}) > 5
    for task in ("sentiment", "spam"):
        (result,) = ask(server, task)["results"]
        (expected,) = oracle.scores(store / task, TEXTS)
        assert list(result["probabilities"].values()) == pytest.approx(expected, abs=1e-4)
    refused = httpx2.get(f"{server.url}/v1/tasks/large")
    assert refused.status_code == 503
    assert "MiB and the bank has 2.0; raise bank_gib" in refused.json()["detail"]
    assert_the_handle_answers(server, run_example)
    taken_s = server.stop(signal.SIGINT, as_terminal=True)
    assert taken_s < STOP_S, server.log.read_text()


@pytest.mark.usefixtures("cluster")  # another Ray runs here, and is not the last one's
def test_a_configuration_file_is_served_until_sigterm(
    server: Any, examples: Path, oracle: Any, run_example: Any
) -> None:
    config = server.write_config(
        adapter_store=str(examples), quantization="none", default_task="topic"
    )
    killed = server.home / "ray" / "ray_current_cluster"  # as the last server here, with its note
    killed.parent.mkdir()
    killed.write_text(f"127.0.0.1:{free_port()}")
    server.start("-m", "deployments", config)
    server.wait_until(lambda: "ready" in server.log.read_text())
    assert f"onebase: ready at {server.url}" in server.log.read_text()
    (result,) = ask(server, "topic")["results"]
    (expected,) = oracle.scores(examples / "topic", TEXTS)
    assert list(result["probabilities"].values()) == pytest.approx(expected, abs=1e-4)
    by_default = httpx2.post(f"{server.url}/predict", json={"texts": TEXTS}).json()
    assert by_default["results"] == [{"prediction": result["prediction"]}]
    assert_the_handle_answers(server, run_example)
    listening = listeners(server)
    # Whoever reaches these may predict, and without a token change what answers.
    direct = [port for port in listening if port in DIRECT_INGRESS]
    assert direct
    for port in (server.port, *direct):
        assert listening[port] == {"127.0.0.1"}, port
    taken_s = server.stop(signal.SIGTERM, as_terminal=False)
    assert taken_s < STOP_S, server.log.read_text()
    assert server.main is not None
    assert server.main.returncode == 0


@pytest.mark.parametrize(
    ("stage", "count"),
    [
        ("-m deployments", 2),  # the launcher and what it watches, before Ray
        pytest.param("gcs_server", 1, marks=pytest.mark.slow),
        pytest.param("ServeController", 1, marks=pytest.mark.slow),
        pytest.param("ServeReplica", 1, marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_during_the_start_leaves_nothing_behind(
    server: Any, examples: Path, stage: str, count: int
) -> None:
    server.start("-m", "deployments", server.write_config(adapter_store=str(examples)))
    server.wait_until(lambda: str(server.processes()).count(stage) >= count)
    taken_s = server.stop(signal.SIGINT, as_terminal=True)
    assert taken_s < STOP_S, server.log.read_text()
    assert "ready" not in server.log.read_text()
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow  # as above, but for the signal
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("as_terminal", [True, False])
def test_a_configuration_file_is_served_until_any_signal(
    server: Any, examples: Path, signum: signal.Signals, as_terminal: bool
) -> None:
    server.start("-m", "deployments", server.write_config(adapter_store=str(examples)))
    server.wait_until(lambda: "ready" in server.log.read_text())
    taken_s = server.stop(signum, as_terminal=as_terminal)
    assert taken_s < STOP_S, server.log.read_text()


@pytest.mark.slow  # as above, but for the signal
def test_nothing_is_left_behind_when_the_launcher_is_killed(server: Any, examples: Path) -> None:
    server.start("-m", "deployments", server.write_config(adapter_store=str(examples)))
    server.wait_until(lambda: "ready" in server.log.read_text())
    taken_s = server.stop(signal.SIGKILL, as_terminal=False)
    assert taken_s < STOP_S, server.log.read_text()


@pytest.mark.slow  # as above, but for the signal
def test_serve_run_ends_with_sigterm(server: Any, examples: Path) -> None:
    server.start(
        "-c", SERVE_RUN, str(server.port), "run", "deployments.app:build", "--name", "onebase",
        "base_model=examples/base", f"adapter_store={examples}", "quantization=none",
    )  # fmt: skip
    server.wait_until(server.answers)
    taken_s = server.stop(signal.SIGTERM, as_terminal=False)
    assert taken_s < STOP_S, server.log.read_text()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            {"adapter_slot": 3, "quantization": "int3"},
            ["unknown key 'adapter_slot'", "adapter_slots", "quantization='int3'", "'int8'"],
        ),
        ({"adapter_store": None}, ["adapter_store=None", "string"]),
        (
            {"base_model": "./no/such/folder"},
            ["base_model='./no/such/folder'", "neither a folder nor a hub id"],
        ),
    ],
    ids=["unknown-key-and-wrong-value", "no-store", "no-base"],
)
def test_a_wrong_configuration_ends_the_start_with_one_sentence(
    server: Any, args: dict[str, Any], words: list[str]
) -> None:
    config = server.write_config(**{"adapter_store": "examples/store", **args})
    server.start("-m", "deployments", config)
    assert server.ends() == 1
    (sentence,) = server.log.read_text().splitlines()
    assert sentence.startswith(f"{config}: ")
    for word in words:
        assert word in sentence


@pytest.mark.slow  # the base of another name is tried three times
def test_a_base_that_cannot_be_had_ends_the_start_with_one_sentence(server: Any) -> None:
    config = server.write_config(adapter_store="examples/store", base_model="nobody/no-such-base")
    server.start("-m", "deployments", config)
    assert server.ends() == 1
    sentences = [
        line for line in server.log.read_text().splitlines() if line.startswith("onebase: ")
    ]
    assert len(sentences) == 1
    assert "base_model='nobody/no-such-base' cannot be loaded" in sentences[0]
    assert "Traceback" not in server.log.read_text()


def test_serve_run_names_a_wrong_key(server: Any) -> None:
    server.start(
        "-c", SERVE_RUN, str(server.port), "run", "deployments.app:build",
        "base_model=examples/base", "adapter_store=examples/store", "adapter_slot=3",
    )  # fmt: skip
    assert server.ends() != 0
    # Anywhere: what Serve prints to stdout may be flushed after the traceback.
    sentence = "unknown key 'adapter_slot'; the keys are base_model, "
    assert sentence in server.log.read_text()


@pytest.mark.parametrize(
    ("max_files", "want"),
    [(resource.RLIM_INFINITY, 16_384), (2**20, 16_384), (20_000, 7960), (1024, 369), (50, 1)],
)
def test_haproxy_has_as_many_connections_as_it_finds_files_for(max_files: int, want: int) -> None:
    assert connections(max_files) == want
    if max_files > 50:
        assert 2.5 * want + 36 <= max_files  # what HAProxy 2.8 asks for
