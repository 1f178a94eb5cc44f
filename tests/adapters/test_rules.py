"""Rules that contradict each other, the kind of problem, or its labels."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from adapters.artifact import Artifact, read_artifact, under_rules
from adapters.directory import Directory
from adapters.errors import AdapterRefused
from adapters.geometry import Geometry
from adapters.rules import Rules, entity_label, lay_over

Read = Callable[..., Artifact]
Refused = Callable[..., tuple[str, ...]]

SINGLE, MULTI = "single_label_classification", "multi_label_classification"
TOKENS = "token_classification"
LABELS = ("safe", "rude", "vile")
IOB = ("O", "B-PER", "I-PER")
WINDOW = {"overflow": "window", "negative_label": "safe"}

GOOD: list[tuple[str, dict[str, Any]]] = [
    (SINGLE, {}),
    (SINGLE, {"threshold": {"rude": 0.5}}),
    (SINGLE, WINDOW),
    (SINGLE, {**WINDOW, "window_scores": "max", "stride": 63, "max_length": 64}),
    (SINGLE, {"overflow": "window", "window_scores": "mean"}),
    (SINGLE, {**WINDOW, "pair": True}),
    (SINGLE, {**WINDOW, "pair": True, "truncation": "only_second"}),
    (SINGLE, {"overflow": "refuse", "truncation": False}),
    (SINGLE, {"overflow": "refuse", "truncation": "only_first"}),
    (SINGLE, {"overflow": "truncate", "truncation": "longest_first"}),
    (MULTI, {"overflow": "window", "threshold": {"safe": 0, "rude": 1, "vile": 0.3}}),
    ("regression", {"overflow": "window", "window_scores": "mean", "stride": 0}),
    (SINGLE, {"priority": "high", "latency_target_ms": 50}),
    (TOKENS, {"threshold": {"PER": 0.5}}),
    (TOKENS, {"aggregation": "first", "threshold": {"PER": 0.5, "O": 0.1}}),
    (TOKENS, {"aggregation": "none", "threshold": {"B-PER": 0.5}}),
    (TOKENS, {"overflow": "window", "stride": 8}),
]
BAD: list[tuple[str, dict[str, Any], str]] = [
    (SINGLE, {"truncation": False, "overflow": "truncate"}, "truncation false refuses long texts"),
    (SINGLE, {"truncation": False, **WINDOW}, 'overflow "window" does not'),
    (SINGLE, {"stride": 4}, "stride means nothing without"),
    (SINGLE, {"overflow": "truncate", "window_scores": "max"}, "window_scores means nothing"),
    (SINGLE, {"overflow": "refuse", "negative_label": "safe"}, "negative_label means nothing"),
    (SINGLE, {**WINDOW, "stride": 64, "max_length": 64}, "stride 64 must be under max_length 64"),
    (SINGLE, {**WINDOW, "pair": True, "truncation": "longest_first"}, "one text of a pair"),
    (SINGLE, {"overflow": "window"}, "need negative_label"),
    (SINGLE, {"overflow": "window", "window_scores": "max"}, 'or window_scores "mean"'),
    (SINGLE, {**WINDOW, "window_scores": "mean"}, "negative_label means nothing but for"),
    (MULTI, WINDOW, "negative_label means nothing but for"),
    (SINGLE, {**WINDOW, "negative_label": "good"}, "negative_label 'good' is not a label"),
    (SINGLE, {"threshold": {"rude": 1, "bad": 0, "odd": 0}}, "threshold names bad, odd, which"),
    ("regression", {"threshold": 0.5}, "threshold means nothing for a regression"),
    ("regression", {"threshold": {"safe": 0.5}}, "threshold means nothing for a regression"),
    (SINGLE, {"aggregation": "simple"}, "aggregation means nothing for single_label"),
    (SINGLE, {"priority": "low", "latency_target_ms": 9}, 'nothing for priority "low"'),
    (TOKENS, {"pair": True}, "pair is not served for token classification"),
    (TOKENS, {"overflow": "window", "window_scores": "max"}, "window_scores means nothing"),
    (TOKENS, {"threshold": {"B-PER": 0.5}}, "threshold names B-PER, which no answer can have"),
    (TOKENS, {"aggregation": "none", "threshold": {"PER": 0.5}}, "threshold names PER"),
]


def problems(problem_type: Any, rules: dict[str, Any]) -> list[str]:
    labels = IOB if problem_type == TOKENS else LABELS
    return Rules.model_validate(rules).problems(problem_type, labels)


@pytest.mark.parametrize(("problem_type", "rules"), GOOD)
def test_rules_that_fit_together_are_taken(problem_type: str, rules: dict[str, Any]) -> None:
    assert problems(problem_type, rules) == []


@pytest.mark.parametrize(("problem_type", "rules", "said"), BAD)
def test_rules_that_contradict_something_are_refused_in_one_sentence(
    problem_type: str, rules: dict[str, Any], said: str
) -> None:
    (problem,) = problems(problem_type, rules)
    assert problem.startswith("task.json: ")
    assert said in problem


def test_all_that_is_wrong_is_told_at_once(refused: Refused) -> None:
    rules = {"truncation": False, "overflow": "window", "aggregation": "max", "threshold": {"x": 1}}
    assert len(refused(task__json=rules)) == 4


def test_thresholds_are_by_the_adapter_s_own_labels(read: Read, refused: Refused) -> None:
    named = {"id2label": {"0": "x", "1": "y", "2": "z"}}
    rules = {"threshold": {"y": 0.75}}
    assert read(config__json=named, task__json=rules).rules.threshold == {"y": 0.75}
    (problem,) = refused(config__json={}, task__json=rules)
    assert "threshold names y" in problem
    assert read(config__json={}, task__json={"threshold": {"LABEL_2": 1}}).num_labels == 3


@pytest.fixture
def tokens(geometry: Geometry, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Make the folder that `read` and `refused` write a token classifier's."""
    config["task_type"] = "TOKEN_CLS"
    geometry.graphs["TOKEN_CLS"] = geometry.graphs["SEQ_CLS"]


@pytest.mark.usefixtures("tokens")
def test_what_a_token_classifier_is_comes_from_its_task_type(read: Read) -> None:
    assert read().problem_type == TOKENS
    assert read(task__json={"problem_type": TOKENS}).problem_type == TOKENS
    # A model's config.json may be any base's.
    assert read(task__json={}, config__json={"problem_type": SINGLE}).problem_type == TOKENS


@pytest.mark.usefixtures("tokens")
def test_a_token_classifier_is_no_other_kind_of_problem(refused: Refused) -> None:
    (problem,) = refused(task__json={"problem_type": SINGLE})
    assert problem == f"problem_type {SINGLE} is not what task_type TOKEN_CLS gives"


@pytest.mark.parametrize("file", ["task__json", "config__json"])
def test_a_classifier_of_texts_is_none_of_tokens(refused: Refused, file: str) -> None:
    (problem,) = refused(**{file: {"problem_type": TOKENS}})
    assert problem == f"problem_type {TOKENS} is not what task_type SEQ_CLS gives"


@pytest.mark.parametrize(
    ("label", "entity"), [("B-PER", "PER"), ("I-a-b", "a-b"), ("PER", "PER"), ("O", "O")]
)
def test_an_entity_is_its_labels_without_their_place(label: str, entity: str) -> None:
    assert entity_label(label) == entity


def test_rules_are_laid_over_others_key_by_key() -> None:
    own = b'{"threshold": {"rude": 0.5}, "max_length": 9}'
    laid = json.loads(lay_over(own, {"threshold": {"vile": 1}, "pair": True}))
    assert laid == {"threshold": {"vile": 1}, "max_length": 9, "pair": True}
    assert lay_over(own, {}) == own
    assert json.loads(lay_over(b"{}", {"pair": True})) == {"pair": True}


@pytest.mark.parametrize("broken", [b"", b"[1]", b"{", b"null", b"[" * 100_000, b"\xff"])
def test_what_is_no_task_json_is_left_for_its_problem_to_be_told(broken: bytes) -> None:
    assert lay_over(broken, {"pair": True}) == broken


def test_the_revision_of_rules_is_that_of_what_they_say() -> None:
    def revision(**rules: Any) -> str:
        return Rules.model_validate(rules).revision

    assert revision() == revision(truncation=True, threshold=None) == "44136fa3"
    assert revision(max_length=9, threshold={"a": 0.5, "b": 1}) == revision(
        threshold={"b": 1.0, "a": 0.5}, max_length=9
    )
    assert (
        len({revision(), revision(max_length=9), revision(labels=["a"]), revision(pair=True)}) == 4
    )


def test_rules_over_an_adapter_s_own_are_checked_as_if_they_were(
    read: Read, refused: Refused, geometry: Geometry
) -> None:
    artifact = read()
    good = {"labels": list(LABELS), **WINDOW, "max_length": 64}
    laid = under_rules(artifact, json.dumps(good).encode(), geometry)
    assert laid.rules == read(task__json=good).rules
    assert artifact.rules == Rules()
    bad: list[Any] = [
        {"labels": ["a"], "max_length": 65, "stride": 4, "base_sha256": "0" * 64},
        {"thresholds": 1, "max_length": 0}, {"problem_type": TOKENS}, [1],
    ]  # fmt: skip
    for rules in bad:
        with pytest.raises(AdapterRefused) as caught:
            under_rules(artifact, json.dumps(rules).encode(), geometry)
        assert caught.value.problems == refused(task__json=rules)


def test_an_adapter_is_read_without_its_rules(
    refused: Refused, store: Directory, geometry: Geometry
) -> None:
    assert refused(task__json={"labels": ["a"]})
    assert read_artifact(store.read("mood"), geometry, ruled=False).rules == Rules()
    assert refused(task__json={"labels": ["a"]}, config__json={"id2label": {"0": "a"}})
    with pytest.raises(AdapterRefused, match=r"refused: config\.json names 1 labels"):
        read_artifact(store.read("mood"), geometry, ruled=False)
