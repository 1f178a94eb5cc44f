"""Two model replicas: each may be asked for any version, and one may die."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

TASKS = ("aspects", "sentiment", "spam", "topic")
TEXTS = ["I absolutely loved this product!", "The parcel came late and nobody answered."]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pair(app: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The examples' tasks behind two replicas at /pair; yields their store."""
    from ray import serve

    from deployments.app import build
    from deployments.config import Args

    store = tmp_path_factory.mktemp("pair") / "store"
    shutil.copytree(ROOT / "examples" / "store", store)
    args = Args(
        base_model=str(ROOT / "examples" / "base"),
        adapter_store=str(store),
        quantization="none",
        device="cpu",
        num_cpus=1,
        num_replicas=2,
    )
    serve.run(build(args), name="pair", route_prefix="/pair")
    yield store
    serve.delete("pair")


def pids(title: str) -> list[int]:
    ours = psutil.Process().children(recursive=True)
    return [p.pid for p in ours if title in " ".join(p.cmdline())]


def model_pids() -> list[int]:
    """The processes of the application's model replicas."""
    return pids("ServeReplica:pair:Model")


def arenas_beside_the_first(pid: int) -> int:
    """How many 64 MiB heaps of threads glibc has reserved: an arena beside the first has one."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if len(line.split()) == 5]
    joined: list[list[int]] = []
    for start, end in [(int(a, 16), int(b, 16)) for a, b in spans]:
        if joined and joined[-1][1] == start and start % 2**26:
            joined[-1][1] = end
        else:
            joined.append([start, end])
    return sum(start % 2**26 == 0 and end - start == 2**26 for start, end in joined)


def probabilities(answer: dict[str, Any]) -> list[list[float]]:
    return [list(result["probabilities"].values()) for result in answer["results"]]


def test_a_call_reaches_the_replica_that_it_names(pair: Path) -> None:
    from ray import serve

    model = serve.get_deployment_handle("Model", "pair")
    told = {model.publish.remote({}).result()[0] for _ in range(40)}
    assert len(told) == 2
    for name in sorted(told) * 10:
        call = model.options(method_name="publish", session_id=name)
        assert call.remote({}).result()[0] == name


def test_both_replicas_answer_every_task_as_peft_does(pair: Path, ask: Any, oracle: Any) -> None:
    assert len(model_pids()) == 2
    want = {
        task: oracle.scores(pair / task, TEXTS, multi_label=task == "aspects") for task in TASKS
    }
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda task: ask(task, TEXTS, prefix="/pair"), TASKS * 16))
    for answer in answers:
        for got, wanted in zip(probabilities(answer), want[answer["task"]], strict=True):
            assert got == pytest.approx(wanted, abs=1e-4)


def test_replicas_have_one_heap_for_all_threads(pair: Path) -> None:
    # Ray overwrites what the kernel shows of a process's environment, so what it does is looked at.
    assert any(map(arenas_beside_the_first, pids("ServeController"))), "it is told nothing"
    replicas = pids("ServeReplica:pair:")
    assert len(replicas) == 4  # two of the model, an ingress, the catalog
    assert not any(map(arenas_beside_the_first, replicas))


def test_a_killed_replica_fails_no_request(pair: Path, ask: Any) -> None:
    want = {task: probabilities(ask(task, TEXTS, prefix="/pair")) for task in TASKS}
    victim = model_pids()[0]
    until_s = time.monotonic() + 6

    def keep_asking(task: str) -> int:
        count = 0
        while time.monotonic() < until_s:
            got = probabilities(ask(task, TEXTS, prefix="/pair"))  # fails on any other status
            for scores, wanted in zip(got, want[task], strict=True):
                assert scores == pytest.approx(wanted, abs=1e-4)
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(keep_asking, task) for task in TASKS]
        time.sleep(1)
        os.kill(victim, signal.SIGKILL)
        assert all(future.result() > 5 for future in asked)
    assert victim not in model_pids()
