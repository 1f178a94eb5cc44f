"""`task.json`: what a task does with its texts and scores. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
Truncation = bool | Literal["longest_first", "only_first", "only_second"]


class Rules(BaseModel):
    """`task.json`: how a task's texts become ids, and its scores an answer. Every key optional."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    labels: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = Field(
        None, description="Label names by index. Else from the folder's config.json, else LABEL_0…"
    )
    problem_type: ProblemType | None = Field(
        None, description="Else from config.json, else guessed: one label is regression."
    )
    threshold: Annotated[float, Field(ge=0, le=1, strict=False)] | None = Field(
        None, description='Below it the answer is "Uncertain" (multi-label: not listed; else 0.5).'
    )
    max_length: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Longest input in tokens, as in training. Else where the folder's tokenizer "
        "cut, else what the base can take.",
    )
    truncation: Truncation = Field(
        True, description="How a longer text is cut, as in training; false refuses it instead."
    )
    padding: bool | Literal["longest", "max_length", "do_not_pad"] = Field(
        True, description="Accepted and without effect: padding never changes an answer here."
    )
    pair: bool = Field(False, description="Whether an input is a pair: a text and a text_pair.")
    base_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        None, description="SHA-256 of the base's model.safetensors, checked where present."
    )

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and len(set(labels)) < len(labels):
            raise ValueError("label names must differ from each other")
        return labels


def read_rules(raw: dict[str, Any], problems: list[str]) -> Rules | None:
    """Validate what `task.json` holds; put a sentence for each problem into `problems`."""
    try:
        return Rules.model_validate(raw)
    except ValidationError as error:
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"][:1])
            what = "is not a known rule" if detail["type"] == "extra_forbidden" else detail["msg"]
            sentence = f"task.json: {key}: {what}"
            if sentence not in problems:
                problems.append(sentence)
        return None
