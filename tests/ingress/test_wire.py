import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.errors import BadInput
from deployments.ingress.wire import Pair, PredictRequest, explain, to_request, to_result
from deployments.rows import Facts

MakeFacts = Callable[..., Facts]


def parse(body: Any) -> PredictRequest:
    return PredictRequest.model_validate_json(json.dumps(body))


def refused(body: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        parse(body)
    said = explain(caught.value.errors())
    assert "\n" not in said
    return said


def test_texts_and_their_defaults() -> None:
    request = parse({"texts": ["a", "b"]})
    assert request.inputs == ["a", "b"]
    assert not request.return_scores
    assert request.threshold is None


def test_a_single_text_is_a_list_of_one() -> None:
    assert parse({"text": "a"}).inputs == ["a"]
    assert parse({"text": ""}).inputs == [""]


def test_pairs_are_read() -> None:
    pair = {"text": "a", "text_pair": "b"}
    assert parse({"texts": [pair, "c"]}).inputs == [Pair(text="a", text_pair="b"), "c"]
    assert parse({"text": pair}).inputs == [Pair(text="a", text_pair="b")]


@pytest.mark.parametrize("threshold", [0, 1, 0.5, None])
def test_a_threshold_is_from_0_to_1(threshold: float | None) -> None:
    assert parse({"text": "a", "threshold": threshold}).threshold == threshold


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "give either texts, a list, or text"),
        ({"texts": ["a"], "text": "a"}, "give either texts, a list, or text"),
        ({"texts": "a"}, "texts"), ({"texts": {"0": "a"}}, "texts"), ({"texts": 5}, "texts"),
        ({"texts": ["a", 5]}, "texts[1]"), ({"texts": ["a", "b", None]}, "texts[2]"),
        ({"texts": [["a"]]}, "texts[0]"), ({"texts": [{"text": "a"}]}, "texts[0]"),
        ({"texts": [{"text": "a", "text_pair": "b", "odd": 1}]}, "texts[0]"),
        ({"text": ["a"]}, "text"), ({"text": 5}, "text"), ({"text": True}, "text"),
        ({"text": "a", "return_scores": "yes"}, "return_scores"),
        ({"text": "a", "return_scores": 1}, "return_scores"),
        ({"text": "a", "threshold": 1.5}, "threshold"),
        ({"text": "a", "threshold": -0.1}, "threshold"),
        ({"text": "a", "threshold": "0.5"}, "threshold"),
        ({"text": "a", "threshold": True}, "threshold"),
        ({"text": "a", "threshold": float("nan")}, "threshold"),
        ({"text": "a", "treshold": 0.5}, "treshold: is not a known field"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_its_field(body: Any, field: str) -> None:
    assert refused(body).startswith(field)


@pytest.mark.parametrize("body", [[], "a", 5, None])
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    assert "JSON object" in refused(body)


def test_every_field_is_told_once() -> None:
    said = refused({"texts": [1, 2], "threshold": 9, "odd": 1})
    assert [said.count(f"{name}: ") for name in ("texts[0]", "texts[1]", "threshold", "odd")] == [
        1, 1, 1, 1,
    ]  # fmt: skip


def test_a_handle_call_may_give_a_text_a_list_or_a_tuple() -> None:
    for texts, inputs in [("a", ["a"]), (["a", "b"], ["a", "b"]), (("a", "b"), ["a", "b"])]:
        assert to_request(texts, return_scores=True, threshold=0.5).inputs == inputs
    pair = {"text": "a", "text_pair": "b"}
    request = to_request([pair], return_scores=False, threshold=None)
    assert request.inputs == [Pair(text="a", text_pair="b")]
    assert to_request(pair, return_scores=False, threshold=None).inputs == request.inputs


@pytest.mark.parametrize(
    ("texts", "scores", "threshold", "field"),
    [
        (5, False, None, "text"), (None, False, None, "give"), ([b"a"], False, None, "texts[0]"),
        ({"a", "b"}, False, None, "text"), ("a", "yes", None, "return_scores"),
        ("a", False, 2.0, "threshold"),
    ],
)  # fmt: skip
def test_a_wrong_handle_call_is_bad_input(
    texts: Any, scores: Any, threshold: Any, field: str
) -> None:
    with pytest.raises(BadInput) as caught:
        to_request(texts, return_scores=scores, threshold=threshold)
    assert str(caught.value).startswith(field)


def test_a_single_label_is_the_most_likely_one(make_facts: MakeFacts) -> None:
    facts = make_facts(labels=["a", "b", "c"])
    scores = [0.2, 0.7, 0.1]
    assert to_result(facts, scores, return_scores=False, threshold=None) == {"prediction": "b"}
    assert to_result(facts, scores, return_scores=True, threshold=None) == {
        "prediction": "b",
        "confidence": 0.7,
        "probabilities": {"a": 0.2, "b": 0.7, "c": 0.1},
    }


@pytest.mark.parametrize(
    ("own", "asked", "prediction"),
    [
        (None, None, "b"), (None, 0.71, "Uncertain"), (None, 0.7, "b"), (0.71, None, "Uncertain"),
        (0.7, None, "b"), (0.9, 0.5, "b"), (0.5, 0.9, "Uncertain"), (0.9, 0.0, "b"),
        (None, 1.0, "Uncertain"),
    ],
)  # fmt: skip
def test_under_the_threshold_it_is_uncertain(
    make_facts: MakeFacts, own: float | None, asked: float | None, prediction: str
) -> None:
    facts = make_facts(labels=["a", "b"], threshold=own)
    result = to_result(facts, [0.3, 0.7], return_scores=True, threshold=asked)
    assert result["prediction"] == prediction
    assert result["confidence"] == 0.7
    assert result["probabilities"] == {"a": 0.3, "b": 0.7}


@pytest.mark.parametrize(
    ("own", "asked", "labels"),
    [
        (None, None, ["b", "c"]), (0.8, None, ["c"]), (0.8, 0.1, ["a", "b", "c"]),
        (None, 1.0, []), (None, 0.0, ["a", "b", "c"]),
    ],
)  # fmt: skip
def test_several_labels_are_those_at_or_over_the_threshold(
    make_facts: MakeFacts, own: float | None, asked: float | None, labels: list[str]
) -> None:
    facts = make_facts(
        labels=["a", "b", "c"], problem_type="multi_label_classification", threshold=own
    )
    scores = [0.1, 0.5, 0.9]
    result = to_result(facts, scores, return_scores=False, threshold=asked)
    assert result == {"prediction": labels}
    assert to_result(facts, scores, return_scores=True, threshold=asked) == {
        "prediction": labels,
        "probabilities": {"a": 0.1, "b": 0.5, "c": 0.9},
    }


@pytest.mark.parametrize(
    ("own", "asked", "prediction"),
    [
        ({"b": 0.71}, None, "Uncertain"), ({"b": 0.7}, None, "b"), ({"a": 0.9}, None, "b"),
        ({}, None, "b"), ({"b": 0.71}, 0.5, "b"), ({"b": 0.5}, 0.71, "Uncertain"),
    ],
)  # fmt: skip
def test_a_single_label_is_held_against_its_own_threshold(
    make_facts: MakeFacts, own: dict[str, float], asked: float | None, prediction: str
) -> None:
    facts = make_facts(labels=["a", "b"], threshold=own)
    result = to_result(facts, [0.3, 0.7], return_scores=False, threshold=asked)
    assert result == {"prediction": prediction}


def test_several_labels_have_their_own_thresholds_else_a_half(make_facts: MakeFacts) -> None:
    facts = make_facts(
        labels=["a", "b", "c", "d"],
        problem_type="multi_label_classification",
        threshold={"a": 0.0, "b": 0.9},
    )
    scores = [0.0, 0.8, 0.5, 0.49]
    result = to_result(facts, scores, return_scores=False, threshold=None)
    assert result == {"prediction": ["a", "c"]}
    assert to_result(facts, scores, return_scores=False, threshold=0.6) == {"prediction": ["b"]}


def test_a_regression_is_its_value_or_values(make_facts: MakeFacts) -> None:
    facts = make_facts(labels=["x"], problem_type="regression", threshold=0.5)
    result = to_result(facts, [-3.5], return_scores=True, threshold=None)
    assert result == {"prediction": -3.5}
    facts = make_facts(labels=["x", "y"], problem_type="regression")
    result = to_result(facts, [1.0, 2.0], return_scores=False, threshold=None)
    assert result == {"prediction": [1.0, 2.0]}
