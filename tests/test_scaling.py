"""How many model replicas a load needs, as a plain function and as Serve calls it."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.serve.config import AutoscalingPolicy

from deployments import scaling
from deployments.scaling import needed, replicas_for


@pytest.mark.parametrize(
    ("queued", "answered", "current", "wanted"),
    [
        ([0.0], [0.0], 1, 1),
        ([200.0], [500.0], 1, 1),  # a fifth of a second's work of 1,000 tokens
        ([600.0], [1000.0], 1, 3),
        ([400.0, 400.0], [900.0, 900.0], 2, 4),
        ([600.0], [1000.0], 3, 3),  # two are being started: what one tells asks for three
        ([10.0, 10.0], [500.0, 500.0], 2, 2),  # short queues, and too much for one
        ([10.0, 10.0], [200.0, 200.0], 2, 1),
        ([0.0] * 4, [0.0] * 4, 4, 1),
    ],
)
def test_replicas_follow_queues_up_and_load_down(
    queued: list[float], answered: list[float], current: int, wanted: int
) -> None:
    assert needed(queued, [1000.0] * len(queued), answered, current) == wanted


def test_nothing_changes_while_nothing_is_known() -> None:
    assert needed([], [], [], 2) == 2
    assert needed([50.0], [0.0], [0.0], 2) == 2


def test_serve_can_call_it_where_none_of_our_code_is() -> None:
    policy = AutoscalingPolicy(policy_function="deployments.scaling:replicas_for")
    pickled = policy.get_serialized_policy_def()
    assert pickled is not None
    call: Any = cloudpickle.loads(pickled)
    assert call is not replicas_for, "it travels by value"
    metrics = {
        scaling.QUEUED: {"a": 600.0},
        scaling.SPEED: {"a": 1000.0},
        scaling.ANSWERED: {"a": 900.0},
    }
    context = SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=1)
    assert call(context) == (3, {})
    assert call(SimpleNamespace(aggregated_metrics=None, target_num_replicas=2)) == (2, {})
