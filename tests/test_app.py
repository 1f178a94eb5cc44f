"""What `build` decides before anything runs."""

from pathlib import Path
from typing import Any

import pytest

import deployments.app
from deployments.config import Args


def device(**given: Any) -> str:
    args = Args(base_model="org/base", adapter_store=".", **given)
    return deployments.app._device(args)


@pytest.mark.parametrize(
    ("given", "there", "chosen"),
    [
        ({}, True, "cuda"),
        ({}, False, "cpu"),
        ({"num_gpus": 0}, True, "cpu"),
        ({"num_gpus": 0.5}, False, "cuda"),
        ({"device": "cpu"}, True, "cpu"),
        ({"device": "cuda"}, False, "cuda"),
    ],
)
def test_auto_is_decided_once_for_all_replicas(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    given: dict[str, Any],
    there: bool,
    chosen: str,
) -> None:
    monkeypatch.setattr(deployments.app.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(deployments.app, "_NVIDIA", tmp_path if there else tmp_path / "none")
    assert device(**given) == chosen


def test_a_gpu_of_the_cluster_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments.app.ray, "is_initialized", lambda: True)
    for gpus, chosen, reserved in ((2.0, "cuda", 1), (0.0, "cpu", 0)):
        monkeypatch.setattr(deployments.app.ray, "cluster_resources", lambda n=gpus: {"GPU": n})
        assert device() == chosen
        args = Args(base_model="org/base", adapter_store=".").on(chosen)
        assert args.gpus == reserved
