import json
from typing import Any

import pytest

from adapters.artifact import Artifact
from adapters.spec import read_spec
from deployments.model.facts import to_facts
from deployments.rows import Facts

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["b", "a"]}


def facts(
    num_labels: int = 2,
    task_type: str = "SEQ_CLS",
    training_length: int | None = None,
    **rules: Any,
) -> Facts:
    files = {"adapter_config.json": {**CONFIG, "task_type": task_type}, "task.json": rules}
    spec, read, problems = read_spec({n: json.dumps(c).encode() for n, c in files.items()})
    assert spec is not None
    assert read is not None
    assert problems == []
    artifact = Artifact("mood", "0" * 8, spec, read, num_labels, 1024, training_length, {})
    assert read.problems(artifact.problem_type, artifact.labels) == []
    return to_facts(artifact, 512)


def test_what_no_file_says_is_told_as_guessed() -> None:
    said = facts(1)
    assert said["guessed"] == ["labels", "problem_type", "max_length"]
    assert (said["problem_type"], said["labels"], said["max_length"]) == (
        "regression", ["LABEL_0"], 512,
    )  # fmt: skip
    assert facts(3)["problem_type"] == "single_label_classification"
    named = facts(labels=["x", "y"], problem_type="multi_label_classification", max_length=9)
    assert named["guessed"] == []


def test_a_token_classifier_says_so_and_is_no_guess() -> None:
    said = facts(3, "TOKEN_CLS")
    assert (said["problem_type"], said["aggregation"]) == ("token_classification", "simple")
    assert said["guessed"] == ["labels", "max_length"]
    assert facts(3, "TOKEN_CLS", aggregation="max")["aggregation"] == "max"
    assert facts(3)["aggregation"] is None


@pytest.mark.parametrize(
    ("rules", "overflow", "truncation"),
    [
        ({}, "truncate", "longest_first"),
        ({"truncation": "only_second"}, "truncate", "only_second"),
        ({"truncation": False}, "refuse", None),
        ({"overflow": "refuse"}, "refuse", None),
        ({"overflow": "refuse", "truncation": "only_first"}, "refuse", None),
        ({"overflow": "window", "window_scores": "mean"}, "window", "longest_first"),
        ({"overflow": "window", "window_scores": "mean", "pair": True}, "window", "only_first"),
        (
            {
                "overflow": "window", "window_scores": "mean", "pair": True,
                "truncation": "only_second",
            },
            "window",
            "only_second",
        ),
    ],
)  # fmt: skip
def test_what_becomes_of_long_texts(
    rules: dict[str, Any], overflow: str, truncation: str | None
) -> None:
    said = facts(**rules)
    assert (said["overflow"], said["truncation"]) == (overflow, truncation)


def test_windows_share_a_quarter_and_give_their_maximum_unless_said() -> None:
    window: dict[str, Any] = {"overflow": "window", "negative_label": "LABEL_0"}
    said = facts(**window)
    assert (said["stride"], said["window_scores"], said["negative_label"]) == (
        128, "max", "LABEL_0",
    )  # fmt: skip
    assert facts(max_length=64, **window)["stride"] == 16
    assert facts(training_length=64, **window)["stride"] == 16
    assert facts(max_length=9999, **window)["stride"] == 128
    assert facts(stride=0, **window)["stride"] == 0
    assert facts(overflow="window", window_scores="mean")["window_scores"] == "mean"
    of_tokens = facts(3, "TOKEN_CLS", overflow="window")
    assert (of_tokens["stride"], of_tokens["window_scores"]) == (128, None)
    without = facts()
    assert without["stride"] is without["window_scores"] is without["negative_label"] is None


def test_priority_is_normal_and_no_latency_is_promised_unless_said() -> None:
    said = facts()
    assert (said["priority"], said["latency_target_ms"]) == ("normal", None)
    said = facts(priority="high", latency_target_ms=50)
    assert (said["priority"], said["latency_target_ms"]) == ("high", 50)
