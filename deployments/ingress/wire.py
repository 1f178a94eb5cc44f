"""The native JSON: what a request may say, and how an answer is shaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deployments.errors import BadInput
from deployments.ingress.entities import Entity
from deployments.rows import Facts

UNCERTAIN = "Uncertain"
_MULTI_LABEL_THRESHOLD = 0.5


class Pair(BaseModel):
    """Two texts that are read as one input."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    text: str
    text_pair: str


class PredictRequest(BaseModel):
    """`POST /v1/tasks/{task}/predict`."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={
            "examples": [{"texts": ["I absolutely loved this product!"], "return_scores": True}]
        },
    )

    texts: list[str | Pair] | None = Field(None, description="The inputs, one result each.")
    text: str | Pair | None = Field(None, description="A single input, instead of `texts`.")
    return_scores: bool = Field(False, description="Whether a result has its probabilities.")
    threshold: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description='Under it a single label is "Uncertain", one of several labels and an entity '
        "are left out; else the task's own.",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> PredictRequest:
        if (self.texts is None) == (self.text is None):
            raise ValueError("give either texts, a list, or text, a single input")
        return self

    @property
    def inputs(self) -> list[str | Pair]:
        """The inputs, whichever way they came."""
        return self.texts if self.texts is not None else [self.text]  # type: ignore[list-item]


def to_request(texts: Any, *, return_scores: Any, threshold: Any) -> PredictRequest:
    """Validate what a handle call was given.

    Raises:
        BadInput: It says what is wrong.
    """
    many = isinstance(texts, (list, tuple))
    given = {"texts": list(texts)} if many else {"text": texts}
    try:
        return PredictRequest.model_validate(
            {**given, "return_scores": return_scores, "threshold": threshold}
        )
    except ValidationError as error:
        raise BadInput(explain(error.errors())) from None


def explain(errors: Sequence[Any], skip: int = 0) -> str:
    """Say what is wrong in one sentence, each field once.

    Args:
        errors: pydantic's details.
        skip: Parts of their locations to leave out: FastAPI puts `body` first.
    """
    sentences: dict[str, str] = {}
    for detail in errors:
        # ("texts", 2, "str"): the field, the index, and a branch of a union that did not fit.
        where = detail["loc"][skip:][:2]
        name = "".join(f"[{part}]" if isinstance(part, int) else part for part in where[:1])
        name += f"[{where[1]}]" if len(where) > 1 and isinstance(where[1], int) else ""
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            message = "is not a known field"
        elif detail["type"] == "string_pattern_mismatch":  # nothing else has a pattern
            message = (
                f"{detail['input'][:40]!r} is no version: 8 hex digits, as GET /v1/tasks/{{task}} "
                "lists them"
            )
        elif detail["type"] == "json_invalid":
            name, message = "", f"the body is not valid JSON: {detail['ctx']['error']}"
        elif not name and detail["type"] != "value_error":
            message = "the body must be a JSON object, sent with content-type: application/json"
        sentences.setdefault(name, f"{name}: {message}" if name else message)
    return "; ".join(sentences.values())


def least(facts: Facts, label: str, threshold: float | None) -> float | None:
    """Return the score from which a label holds: the request's threshold, else the task's."""
    own = facts["threshold"] if threshold is None else threshold
    return own.get(label) if isinstance(own, dict) else own


def to_result(
    facts: Facts, scores: list[float], *, return_scores: bool, threshold: float | None
) -> dict[str, Any]:
    """Shape the answer of a whole text.

    Args:
        facts: The task.
        scores: One a label: probabilities, or values for a regression.
        return_scores: Whether to add `probabilities`, and `confidence` of a single label.
        threshold: The request's own; the task's if None.

    Returns:
        `prediction`. Of a single label the likeliest, or "Uncertain" if it is under its threshold.
        Of several labels the list of those at or over theirs, 0.5 unless said: it is empty where
        none is, and never "Uncertain". Of a regression the value, or values: there is nothing to
        be uncertain by, and thresholds are refused.
    """
    labels = facts["labels"]
    if facts["problem_type"] == "regression":
        return {"prediction": scores[0] if len(scores) == 1 else scores}
    result: dict[str, Any]
    if facts["problem_type"] == "multi_label_classification":
        floors = [least(facts, label, threshold) for label in labels]
        result = {
            "prediction": [
                label
                for label, score, floor in zip(labels, scores, floors, strict=True)
                if score >= (_MULTI_LABEL_THRESHOLD if floor is None else floor)
            ]
        }
    else:
        confidence = max(scores)
        label = labels[scores.index(confidence)]
        floor = least(facts, label, threshold)
        result = {"prediction": label if floor is None or confidence >= floor else UNCERTAIN}
        if return_scores:
            result["confidence"] = confidence
    if return_scores:
        result["probabilities"] = dict(zip(labels, scores, strict=True))
    return result


def to_token_result(
    facts: Facts, text: str, entities: Sequence[Entity], *, threshold: float | None
) -> dict[str, Any]:
    """Shape the answer of a text whose tokens were classified.

    Args:
        facts: The task.
        text: The text that the entities are in.
        entities: What was found in it.
        threshold: The request's own; the task's if None.

    Returns:
        `prediction`: the entities at or over their label's threshold, all if it has none, in their
        order; none is "Uncertain". Each has its `score` whether or not scores are asked for.
    """
    found = []
    for entity in entities:
        floor = least(facts, entity.label, threshold)
        if floor is None or entity.score >= floor:
            found.append({**entity._asdict(), "text": text[entity.start : entity.end]})
    return {"prediction": found}
