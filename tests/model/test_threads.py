import os
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.config import Args
from deployments.model import threads
from deployments.model.threads import count_cpus, forward_thread, forward_threads


def args(**given: Any) -> Args:
    return Args.model_validate({"base_model": "org/base", "adapter_store": ".", **given})


@pytest.fixture
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "count_cpus", lambda: 16)


@pytest.mark.parametrize(
    ("given", "num_nodes", "want"),
    [
        ({}, 1, 15),
        ({"num_cpus": 3}, 1, 3),
        ({"num_cpus": 3, "num_replicas": 8}, 1, 3),
        ({"num_replicas": 4}, 1, 3),
        ({"num_replicas": 4}, 4, 15),
        ({"num_replicas": 5}, 4, 7),
        ({"max_replicas": 7}, 1, 2),
        ({"num_replicas": 100}, 1, 1),
        ({"num_replicas": 4}, 0, 3),
        ({"num_replicas": 4, "device": "cuda"}, 1, 16),
    ],
)
@pytest.mark.usefixtures("sixteen_cpus")
def test_a_forward_has_its_share_of_the_node(
    given: dict[str, Any], num_nodes: int, want: int
) -> None:
    assert forward_threads(args(**given), num_nodes) == want


def test_a_container_s_quota_counts(tmp_path: Path) -> None:
    here = len(os.sched_getaffinity(0))
    quota = tmp_path / "cpu.max"
    assert count_cpus(quota) == here
    for told, want in (
        ("max 100000\n", here), ("100000 100000\n", 1), ("50000 100000\n", 1),
        (f"{(here + 5) * 100000} 100000\n", here), ("nonsense\n", here),
    ):  # fmt: skip
        quota.write_text(told)
        assert count_cpus(quota) == want, told


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_forward_on_the_cpu_gives_way_to_the_event_loop(on_cpu: bool) -> None:
    def of_thread() -> tuple[int, int]:
        return torch.get_num_threads(), os.nice(0)

    before = of_thread()
    with forward_thread(1, on_cpu=on_cpu) as thread:
        told = thread.submit(of_thread).result()
    assert told == (1, min(19, before[1] + 5 * on_cpu))
    assert of_thread() == before
