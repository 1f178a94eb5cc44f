import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapters.artifact import Artifact
from adapters.geometry import Geometry

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]
Read = Callable[..., Artifact]
Refused = Callable[..., tuple[str, ...]]
PREFIX = "base_model.model."
QUERY = "bert.layer.0.query"


def test_a_good_adapter_is_read_as_its_sites_read_it(read: Read, tensors: Tensors) -> None:
    artifact = read()
    for n in (0, 1):
        path = f"bert.layer.{n}.query"
        a, b = (tensors[f"{PREFIX}{path}.lora_{half}.weight"] for half in "AB")
        assert torch.equal(artifact.tensors[f"{path}.lora_A"], a)
        assert torch.equal(artifact.tensors[f"{path}.lora_B"], 3 * b.t())  # alpha 6 over r 2
        x = torch.randn(5, 6)
        product = x @ artifact.tensors[f"{path}.lora_A"].t() @ artifact.tensors[f"{path}.lora_B"]
        assert torch.allclose(product, 3 * (x @ a.t() @ b.t()), atol=1e-5)
    for path in ("bert.pooler", "classifier"):
        for leaf in ("weight", "bias"):
            assert torch.equal(
                artifact.tensors[f"{path}.{leaf}"], tensors[f"{PREFIX}{path}.{leaf}"]
            )
    assert len(artifact.tensors) == len(tensors)
    assert all(t.dtype == torch.float32 for t in artifact.tensors.values())
    assert artifact.num_labels == 3
    assert artifact.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert artifact.task == "mood"
    assert not artifact.without_tensors().tensors


def test_rslora_scales_by_the_root_of_the_rank(
    read: Read, config: Config, tensors: Tensors
) -> None:
    config["use_rslora"] = True
    b = tensors[f"{PREFIX}{QUERY}.lora_B.weight"]
    assert torch.allclose(read().tensors[f"{QUERY}.lora_B"], b.t() * 6 / math.sqrt(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_is_read_as_fp32(read: Read, tensors: Tensors, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    artifact = read(adapter_model__safetensors=stored)
    weight = artifact.tensors["classifier.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, stored[f"{PREFIX}classifier.weight"].float())


def test_labels_come_from_the_rules_then_the_models_config_then_their_index(read: Read) -> None:
    assert read().labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    named = {"id2label": {"0": "x", "1": "y", "2": "z"}}
    assert read(config__json=named).labels == ("x", "y", "z")
    rules = {"labels": ["a", "b", "c"]}
    assert read(config__json=named, task__json=rules).labels == ("a", "b", "c")


def test_the_problem_type_comes_from_the_rules_then_the_models_config_then_the_head(
    read: Read, tensors: Tensors
) -> None:
    multi, single = "multi_label_classification", "single_label_classification"
    assert read().problem_type == single
    assert read(config__json={"problem_type": multi}).problem_type == multi
    assert read(task__json={"problem_type": "regression"}).problem_type == "regression"
    one = {n: t[:1] if "classifier" in n else t for n, t in tensors.items()}
    assert (
        read(adapter_model__safetensors=one, task__json={}, config__json={}).problem_type
        == "regression"
    )


@pytest.mark.parametrize("base", ["other/base", "org/base-large", "other/base@main"])
def test_another_hub_base_is_refused(refused: Refused, config: Config, base: str) -> None:
    config["base_model_name_or_path"] = base
    (problem,) = refused()
    assert problem == (
        f"it was trained on the base {base.split('@')[0]}, not org/base; "
        "if they are the same, name it in base_aliases"
    )


@pytest.mark.parametrize(
    "base", ["org/base", "org/base@v2", "/home/me/base", "./base", "a/b/c", "base", "", None]
)
def test_the_same_base_or_a_path_is_no_other_base(read: Read, config: Config, base: Any) -> None:
    config["base_model_name_or_path"] = base
    assert read().num_labels == 3


def test_a_server_that_names_a_folder_takes_any_hub_id(
    read: Read, config: Config, geometry: Geometry
) -> None:
    config["base_model_name_or_path"] = "other/base"
    assert read(geometry=replace(geometry, base_id=None)).num_labels == 3


def test_another_architecture_is_refused(refused: Refused, read: Read, config: Config) -> None:
    config["auto_mapping"] = {"base_model_class": "BertForSequenceClassification"}
    read()
    config["auto_mapping"] = {"base_model_class": "RobertaForSequenceClassification"}
    (problem,) = refused()
    assert "RobertaForSequenceClassification, not BertForSequenceClassification" in problem


def test_the_bases_digest_is_checked_where_it_is_named(read: Read, refused: Refused) -> None:
    rules = {"base_sha256": "a1" * 32}
    read(base_sha256="b2" * 32)
    read(task__json=rules, base_sha256="a1" * 32)
    (problem,) = refused(task__json=rules, base_sha256="b2" * 32)
    assert "a1a1a1a1…" in problem
    assert "b2b2b2b2…" in problem
    (problem,) = refused(task__json=rules, base_sha256=None)
    assert "none" in problem


def test_a_max_length_over_the_positions_is_refused(
    read: Read, refused: Refused, geometry: Geometry
) -> None:
    read(task__json={"max_length": 64})
    (problem,) = refused(task__json={"max_length": 65})
    assert "max_length 65 is over the base's 64" in problem
    read(task__json={"max_length": 65}, geometry=replace(geometry, max_positions=None))
