from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapters.artifact import Artifact
from adapters.geometry import Geometry, HeadShape

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]
Read = Callable[..., Artifact]
Refused = Callable[..., tuple[str, ...]]
PREFIX = "base_model.model."
QUERY = "bert.layer.0.query"


# What makes a tensor wrong, and what must be said of it.
WRONG: list[tuple[str, Callable[[torch.Tensor], Any], str]] = [
    (f"{QUERY}.lora_A.weight", lambda t: None, f"missing: {QUERY}.lora_A"),
    (f"{QUERY}.lora_B.weight", lambda t: None, f"missing: {QUERY}.lora_B"),
    ("classifier.weight", lambda t: None, "no head weights: classifier.weight missing"),
    ("classifier.bias", lambda t: None, "no head weights: classifier.bias missing"),
    ("bert.pooler.weight", lambda t: None, "no head weights: bert.pooler.weight missing"),
    (f"{QUERY}.lora_A.weight", lambda t: t[:, :5], "lora_A.weight is [2, 5], not [2, 6]"),
    (f"{QUERY}.lora_A.weight", lambda t: t[:1], "lora_A.weight is [1, 6], not [2, 6]"),
    (f"{QUERY}.lora_B.weight", lambda t: t.t(), "lora_B.weight is [2, 4], not [4, 2]"),
    ("classifier.weight", lambda t: t[:, :5], "classifier.weight is [3, 5], not [3, 6]"),
    ("classifier.weight", lambda t: t.flatten(), "classifier.weight is [18]"),
    ("classifier.weight", lambda t: t[0, 0], "classifier.weight is []"),
    ("classifier.bias", lambda t: t[:2], "classifier.bias is [2], not [3]"),
    ("classifier.bias", lambda t: t[0], "classifier.bias is []"),
    ("bert.pooler.weight", lambda t: t[:3], "bert.pooler.weight is [3, 6], not [6, 6]"),
    ("classifier.weight", lambda t: t / 0, "classifier.weight holds NaN or infinite values"),
    ("classifier.bias", lambda t: t * torch.nan, "classifier.bias holds NaN or infinite values"),
    (f"{QUERY}.lora_B.weight", lambda t: t.double() * 1e300, "lora_B.weight holds NaN or infinite"),
    (f"{QUERY}.lora_B.weight", lambda t: t.to(torch.int64), "dtype torch.int64, not a float"),
    ("classifier.weight", lambda t: t.to(torch.int8), "dtype torch.int8, not a float"),
    ("classifier.bias", lambda t: t > 0, "dtype torch.bool, not a float"),
]


@pytest.mark.parametrize(("name", "change", "said"), WRONG)
def test_a_wrong_tensor_is_the_one_problem(
    refused: Refused,
    tensors: Tensors,
    name: str,
    change: Callable[[torch.Tensor], Any],
    said: str,
) -> None:
    changed = change(tensors.pop(PREFIX + name))
    if changed is not None:
        tensors[PREFIX + name] = changed.contiguous()
    (problem,) = refused()
    assert said in problem


@pytest.mark.parametrize(
    "name",
    [
        f"{PREFIX}bert.layer.7.query.lora_A.weight",  # no such module
        f"{PREFIX}bert.layer.0.dense.lora_A.weight",  # not among the target modules
        f"{PREFIX}{QUERY}.lora_A.bias",
        f"{PREFIX}{QUERY}.lora_C.weight",
        f"{PREFIX}{QUERY}.lora_magnitude_vector",
        f"{PREFIX}{QUERY}.weight",  # a base weight, trained whole
        f"{PREFIX}classifier.scale",
        f"{PREFIX}classifier.lora_A.weight",
        f"{PREFIX}bert.embeddings.word_embeddings.weight",  # this base lets none be targeted
        "x",
        "",
        "classifier.weight",  # a second one, without the prefix
    ],
)
def test_a_tensor_that_matches_nothing_is_refused_by_name(
    refused: Refused, tensors: Tensors, name: str
) -> None:
    tensors[name] = torch.zeros(2, 6)
    (problem,) = refused()
    assert problem == f"tensors that match nothing here: {name}"


def test_targets_that_match_nothing_are_refused(
    refused: Refused, config: Config, tensors: Tensors
) -> None:
    config["target_modules"] = ["q_proj"]
    for name in [name for name in tensors if "lora_" in name]:
        del tensors[name]
    assert refused() == ("target_modules matches no module of this base",)


def test_a_tensor_that_is_stored_under_two_names_is_refused(
    refused: Refused, config: Config, tensors: Tensors
) -> None:
    config["bias"] = "lora_only"
    for layer in (0, 1):
        tensors[f"{PREFIX}bert.layer.{layer}.query.base_layer.bias"] = torch.zeros(4)
    tensors[f"{PREFIX}{QUERY}.bias"] = torch.ones(4)
    assert refused() == (f"tensors that match nothing here: {PREFIX}{QUERY}.bias",)


def test_a_linear_without_a_bias_takes_none(refused: Refused, geometry: Geometry) -> None:
    graph = geometry.graphs["SEQ_CLS"]
    heads = {**graph.heads, "classifier": HeadShape({"weight": (2, 6)}, labelled=True)}
    problems = refused(geometry=replace(geometry, graphs={"SEQ_CLS": replace(graph, heads=heads)}))
    assert problems == (f"tensors that match nothing here: {PREFIX}classifier.bias",)


def test_a_head_without_labels_is_refused(refused: Refused, tensors: Tensors) -> None:
    for leaf in ("weight", "bias"):
        name = f"{PREFIX}classifier.{leaf}"
        tensors[name] = tensors[name][:0]
    assert f"{PREFIX}classifier.weight is [0, 6]" in "; ".join(refused())


def test_a_head_whose_parts_disagree_is_refused_however_its_file_is_read(
    refused: Refused, tensors: Tensors
) -> None:
    tensors[f"{PREFIX}classifier.bias"] = torch.zeros(2)
    for _ in range(20):  # safetensors gives the tensors in another order each time
        assert refused() == (f"{PREFIX}classifier.bias is [2], not [3]",)


def test_a_scaling_that_makes_weights_infinite_is_refused(refused: Refused, config: Config) -> None:
    config["lora_alpha"] = 1e39
    assert f"{PREFIX}{QUERY}.lora_B.weight holds NaN or infinite values" in refused()


@pytest.mark.parametrize("labels", [["a", "b"], ["a", "b", "c", "d"]])
def test_a_wrong_number_of_label_names_is_refused(refused: Refused, labels: list[str]) -> None:
    said = f"names {len(labels)} labels, the head has 3"
    assert refused(task__json={"labels": labels}) == (f"task.json {said}",)
    named = {"id2label": dict(enumerate(labels))}
    assert refused(task__json={}, config__json=named) == (f"config.json {said}",)


@pytest.mark.parametrize(
    "content",
    [
        b"\2\0\0\0\0\0\0\0[]",
        b"\2\0\0\0\0\0\0\0{{",
        b"\2\0\0\0\0\0\0\0\xff\xff",
        b"\0" * 64,
        b'\x35\0\0\0\0\0\0\0{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}' + b"\0" * 4,
        b'\x35\0\0\0\0\0\0\0{"x":{"dtype":"X99","shape":[1],"data_offsets":[0,4]}}' + b"\0" * 4,
        b'\x35\0\0\0\0\0\0\0{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}' + b"\0" * 4,
    ],
)
def test_weights_that_are_no_safetensors_are_refused(refused: Refused, content: bytes) -> None:
    (problem,) = refused(adapter_model__safetensors=content)
    assert problem.startswith("adapter_model.safetensors cannot be read")


def test_a_digit_bomb_is_refused(refused: Refused) -> None:
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 5000 + b"]}}"
    (problem,) = refused(adapter_model__safetensors=len(header).to_bytes(8, "little") + header)
    assert problem.startswith("adapter_model.safetensors cannot be read")


def test_problems_of_config_rules_and_weights_are_told_together(
    refused: Refused, config: Config
) -> None:
    config["use_qalora"] = True
    said = "; ".join(
        refused(task__json={"pear": 1}, adapter_model__safetensors=b"\2\0\0\0\0\0\0\0[]")
    )
    for part in ("use_qalora", "task.json: pear", "cannot be read"):
        assert part in said


def test_all_problems_of_a_bad_adapter_are_in_one_message(
    refused: Refused, config: Config, tensors: Tensors
) -> None:
    config |= {"base_model_name_or_path": "other/base", "r": 8}
    config["auto_mapping"] = {"base_model_class": "T5ForSequenceClassification"}
    for n in (0, 1):
        tensors[f"{PREFIX}bert.layer.{n}.query.lora_A.weight"] = torch.randn(8, 6)
        tensors[f"{PREFIX}bert.layer.{n}.query.lora_B.weight"] = torch.randn(4, 8)
    del tensors[f"{PREFIX}bert.layer.1.query.lora_B.weight"]
    del tensors[f"{PREFIX}bert.pooler.weight"]
    tensors[f"{PREFIX}classifier.weight"] = torch.randn(9, 6) / 0
    tensors[f"{PREFIX}classifier.bias"] = torch.zeros(9, dtype=torch.int32)
    tensors[f"{PREFIX}bert.pooler.bias"] = torch.zeros(7)
    tensors |= {f"stray.{n}": torch.zeros(1) for n in range(300)}
    problems = refused(
        task__json={"labels": ["a", "b"], "base_sha256": "a1" * 32, "max_length": 999},
        base_sha256="b2" * 32,
    )
    said = "; ".join(problems)
    for part in (
        "a T5ForSequenceClassification, not",
        "the base other/base, not org/base",
        "base_sha256 is a1a1a1a1…",
        "max_length 999 is over",
        "task.json names 2 labels, the head has 9",
        "classifier.weight holds NaN",
        "classifier.bias has dtype torch.int32",
        "bert.pooler.bias is [7], not [6]",
        "no head weights: bert.pooler.weight missing",
        "missing: bert.layer.1.query.lora_B",
        "tensors that match nothing here: stray.0, stray.1",
        "and 296 more",
    ):
        assert part in said, part
    assert len(problems) == 11
    assert len(said) < 1500


def test_one_label_is_no_single_label_classification(refused: Refused, tensors: Tensors) -> None:
    tensors[PREFIX + "classifier.weight"] = torch.ones(1, 6)
    tensors[PREFIX + "classifier.bias"] = torch.ones(1)
    (problem,) = refused(task__json={"problem_type": "single_label_classification"})
    assert "one label" in problem


def test_a_regression_takes_no_threshold(refused: Refused) -> None:
    (problem,) = refused(task__json={"problem_type": "regression", "threshold": 0.5})
    assert "threshold means nothing for a regression" in problem
