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


def test_replicas_are_scaled_by_queued_tokens_and_checked_every_second(tmp_path: Path) -> None:
    args = Args(
        base_model="org/base",
        adapter_store=str(tmp_path),
        device="cpu",
        min_replicas=1,
        max_replicas=3,
    )
    application = deployments.app.build(args)
    model = next(
        a for a in application._bound_deployment.init_args if hasattr(a, "_bound_deployment")
    )
    config = model._bound_deployment._deployment_config
    assert config.autoscaling_config.max_replicas == 3
    policy = config.autoscaling_config.policy.policy_function
    assert policy == "deployments.scaling:replicas_for"
    assert config.health_check_period_s * 3 + config.health_check_timeout_s < 10
