"""One Ray cluster and one application for every test of this folder.

Ray is imported inside the fixtures, and its environment set there, so that collecting this folder
changes nothing for tests of others that run in the same process.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx2
import pytest

from benchmarks.servers import free_port
from tests.serve import head

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "examples" / "base"
EXAMPLES = ROOT / "examples" / "store"
TASKS = ("aspects", "sentiment", "spam", "topic")
START_S = 120.0  # on a busy machine
STOP_S = 10.0


class MakeAdapter(Protocol):
    """Writes a random adapter; see the fixture `make_adapter`."""

    def __call__(
        self,
        folder: Path,
        *,
        rank: int = 4,
        labels: int = 2,
        targets: tuple[str, ...] = ("query", "value"),
        base: Any = None,
        seed: int = 0,
    ) -> Path: ...


class Ask(Protocol):
    """Asks a task over HTTP; see the fixture `ask`."""

    def __call__(
        self, task: str, texts: list[str], prefix: str = "", **body: Any
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class App:
    """The application that all tests share.

    Attributes:
        base_url: Where it listens.
        store: Its adapter store, a copy of the examples': what a test adds there, it removes.
        handle: Its handle in this process.
        address: Ray's, for other processes.
    """

    base_url: str
    store: Path
    handle: Any
    address: str


class Oracle:
    """PEFT itself, one adapter at a time, in fp32, with AutoTokenizer."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoTokenizer

        torch.set_num_threads(2)
        self._tokenizer = AutoTokenizer.from_pretrained(BASE)
        self._models: dict[tuple[Path, int], Any] = {}

    def scores(
        self,
        folder: Path,
        texts: Sequence[str | tuple[str, str]],
        *,
        multi_label: bool = False,
        max_length: int = 128,
        stride: int | None = None,
    ) -> list[list[float]]:
        """Returns for each text or pair, with a stride for each window, one probability a label."""
        import torch

        version = (folder, (folder / "adapter_model.safetensors").stat().st_mtime_ns)
        if version not in self._models:
            self._models[version] = self._load(folder)
        windows = {} if stride is None else {"stride": stride, "return_overflowing_tokens": True}
        inputs = self._tokenizer(
            texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt",
            **windows,
        )  # fmt: skip
        inputs.pop("overflow_to_sample_mapping", None)
        with torch.inference_mode():
            logits = self._models[version](**inputs).logits
            return (logits.sigmoid() if multi_label else logits.softmax(1)).tolist()

    @staticmethod
    def _load(folder: Path) -> Any:
        from peft import PeftModel
        from safetensors import safe_open
        from transformers import AutoModelForSequenceClassification

        with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
            (head,) = (n for n in weights.keys() if n.endswith("classifier.weight"))  # noqa: SIM118
            labels = weights.get_slice(head).get_shape()[0]
        model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=labels)
        return PeftModel.from_pretrained(model, folder).eval()


class Server:
    """A started server and everything below it, known by a path in their environments."""

    def __init__(self, home: Path, port: int) -> None:
        self.home = home
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = home / "log"
        # Ports and paths of its own, so that a server that somebody runs here is not disturbed.
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "HOME": str(home),
            "RAY_TMPDIR": str(home),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
            **head.fast_path(home),
        }
        self.main: subprocess.Popen[bytes] | None = None

    def start(self, *command: str) -> None:
        # A shell's background job ignores SIGINT, and whatever it starts would inherit that.
        inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
        with self.log.open("wb") as log:
            self.main = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        signal.signal(signal.SIGINT, inherited)

    def wait_until(self, happened: Callable[[], bool]) -> None:
        assert self.main is not None
        until_s = time.monotonic() + START_S
        while not happened():
            assert self.main.poll() is None, self.log.read_text()
            assert time.monotonic() < until_s, self.log.read_text()
            time.sleep(0.1)

    def answers(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/v1/tasks").status_code == 200
        except httpx2.TransportError:
            return False

    def processes(self) -> dict[int, str]:
        """Pid -> command line of every process that was started from here and still runs."""
        mark = str(self.home).encode()
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                command = (folder / "cmdline").read_bytes() if folder.name.isdigit() else b""
                if command and mark in command + (folder / "environ").read_bytes():
                    found[int(folder.name)] = command.replace(b"\0", b" ").decode()
            except OSError:  # it has ended meanwhile
                continue
        return found

    def address(self) -> str:
        """Ray's, for other processes."""
        (address,) = set(re.findall(r"--gcs-address=([\w.:]+)", str(self.processes())))
        return address

    def stop(self, signum: signal.Signals, *, as_terminal: bool) -> float:
        """Sends a signal, to the whole group if as a terminal does; returns how long it took."""
        assert self.main is not None
        started_s = time.monotonic()
        (os.killpg if as_terminal else os.kill)(self.main.pid, signum)
        self.main.wait(60)
        self.wait_until_gone()
        taken_s = time.monotonic() - started_s
        print(f"stopped in {taken_s:.1f} s")
        return taken_s

    def wait_until_gone(self) -> None:
        """Waits until no process is left, and fails if one stays."""
        until_s = time.monotonic() + STOP_S
        while left := self.processes():
            assert time.monotonic() < until_s, left
            time.sleep(0.05)

    def ends(self) -> int:
        """Waits until it has ended by itself, and returns its exit status."""
        assert self.main is not None
        status = self.main.wait(START_S)
        self.wait_until_gone()
        return status

    def write_config(self, deployments: Sequence[dict[str, Any]] = (), **args: Any) -> str:
        """Writes a configuration file (JSON is YAML) and returns its path."""
        path = self.home / "config.yaml"
        application = {
            "name": "onebase",
            "route_prefix": "/",
            "import_path": "deployments.app:build",
            "args": {"base_model": "examples/base", **args},
            "deployments": list(deployments),
        }
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "applications": [application],
        }
        path.write_text(json.dumps(config))
        return str(path)


@contextmanager
def _a_server() -> Iterator[Server]:
    # Short, since the paths of Ray's sockets below it must fit the system.
    home = Path(tempfile.mkdtemp(prefix="onebase-", dir="/tmp"))
    server = Server(home, free_port())
    try:
        yield server
    finally:
        for pid in server.processes():
            os.kill(pid, signal.SIGKILL)
        if server.main is not None:
            server.main.wait(10)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def a_server() -> Callable[[], AbstractContextManager[Server]]:
    """Makes a server with HAProxy and throughput mode, not started yet, that is killed at last."""
    return _a_server


@pytest.fixture
def server() -> Iterator[Server]:
    """A server for one test; see `a_server`."""
    with _a_server() as server:
        yield server


@pytest.fixture(scope="session")
def short_dir() -> Iterator[Path]:
    """A folder with a path so short that the paths of Ray's sockets below it fit the system."""
    folder = Path(tempfile.mkdtemp(prefix="onebase-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def examples() -> Path:
    """The examples' adapter store; tests copy it."""
    return EXAMPLES


@pytest.fixture(scope="session")
def example_args(examples: Path) -> Any:
    """Arguments that serve the examples' tasks in one thread, without quantisation."""
    from deployments.config import Args

    return Args(
        base_model=str(BASE),
        adapter_store=str(examples),
        quantization="none",
        device="cpu",
        num_cpus=1,
    )


@pytest.fixture(scope="session")
def cluster(short_dir: Path) -> Iterator[str]:
    """Ray and Serve's plain HTTP path (no HAProxy, no throughput mode); yields the HTTP URL."""
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            environment.delenv(name)
        for name, value in {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # its default warns, and warnings are errors
            "RAY_EXPORT_COUNTER_AS_GAUGE": "0",
            "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.05",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
            "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.1",
        }.items():
            environment.setenv(name, value)
        import ray
        from ray import serve

        # If this fails, a shutdown of Serve would look for another cluster, and wait for it.
        ray.init(
            address="local",
            num_cpus=8,  # Reserved, not used: two applications, one with two model replicas.
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            object_store_memory=100 * 2**20,
            _temp_dir=str(short_dir / "ray"),
        )
        try:
            port = free_port()
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture(scope="session")
def app(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> App:
    """The example tasks, served without quantisation so that PEFT in fp32 is their oracle."""
    import ray
    from ray import serve

    from deployments.app import build
    from deployments.config import Args

    store = tmp_path_factory.mktemp("serve") / "store"
    shutil.copytree(EXAMPLES, store)
    args = Args(
        base_model=str(BASE),
        adapter_store=str(store),
        default_task="sentiment",
        quantization="none",
        device="cpu",
        num_cpus=1,
    )
    handle = serve.run(build(args), name="onebase", route_prefix="/")
    return App(cluster, store, handle, ray.get_runtime_context().gcs_address)


@pytest.fixture(scope="session")
def http(app: App) -> Iterator[httpx2.Client]:
    """A client of the application; threads may share it."""
    with httpx2.Client(base_url=app.base_url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def ask(http: httpx2.Client) -> Ask:
    """Asks a task over HTTP and returns its answer."""

    def ask(task: str, texts: list[str], prefix: str = "", **body: Any) -> dict[str, Any]:
        path = f"{prefix}/v1/tasks/{task}/predict"
        response = http.post(path, json={"texts": texts, "return_scores": True, **body})
        assert response.status_code == 200, response.text
        return response.json()

    return ask


@pytest.fixture(scope="session")
def run_example() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs examples/handle_call.py where our code cannot be imported, and makes sure of that."""
    script = (
        "import importlib.util, runpy, sys\n"
        "assert not any(map(importlib.util.find_spec, ('deployments', 'adapters'))), sys.path\n"
        f"sys.argv[0] = {str(ROOT / 'examples' / 'handle_call.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "assert not {'torch', 'deployments', 'adapters'} & sys.modules.keys()\n"
    )

    def run(
        cwd: Path,
        address: str,
        *arguments: str,
        python: str | Path = sys.executable,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "RAY_"))}
        return subprocess.run(
            [python, "-I", "-c", script, *arguments],
            cwd=cwd,
            env={**plain, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled", **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture(scope="session")
def assert_problem() -> Callable[..., None]:
    """Fails unless a response is problem details whose sentence has all of some words."""

    def check(response: httpx2.Response, status: int, *words: str) -> None:
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/problem+json"
        problem = response.json()
        assert problem["status"] == status
        assert problem["type"] == "about:blank"
        assert problem["title"]
        for word in words:
            assert word in problem["detail"], problem

    return check


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """PEFT, one adapter at a time."""
    return Oracle()


@pytest.fixture(scope="session")
def make_adapter() -> MakeAdapter:
    """Writes a random adapter of the example base, or of another, as PEFT saves it."""

    def make(
        folder: Path,
        *,
        rank: int = 4,
        labels: int = 2,
        targets: tuple[str, ...] = ("query", "value"),
        base: Any = None,
        seed: int = 0,
    ) -> Path:
        import torch
        from peft import LoraConfig, TaskType, get_peft_model
        from transformers import AutoModelForSequenceClassification

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = base or AutoModelForSequenceClassification.from_pretrained(
                BASE, num_labels=labels
            )
            config = LoraConfig(
                task_type=TaskType.SEQ_CLS, r=rank, target_modules=list(targets), lora_alpha=16
            )
            model = get_peft_model(model, config)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and parameter.ndim == 2:
                    torch.nn.init.normal_(parameter, std=0.3 if "classifier" in name else 0.05)
        model.save_pretrained(folder)
        return folder

    return make
