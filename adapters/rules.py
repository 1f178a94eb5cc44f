"""`task.json`: what a task does with its texts and scores. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
)

ProblemType = Literal[
    "single_label_classification",
    "multi_label_classification",
    "regression",
    "token_classification",
]
Truncation = bool | Literal["longest_first", "only_first", "only_second"]
Overflow = Literal["truncate", "refuse", "window"]
WindowScores = Literal["max", "mean"]
Aggregation = Literal["none", "simple", "first", "max"]
Priority = Literal["high", "normal", "low"]
Share = Annotated[float, Field(ge=0, le=1)]
# Told apart first, so that a wrong one is told once and not as a wrong number and a wrong object.
Threshold = Annotated[
    Annotated[Share, Tag("number")] | Annotated[dict[str, Share], Tag("labels")],
    Discriminator(lambda value: "labels" if isinstance(value, dict) else "number"),
]


class Rules(BaseModel):
    """`task.json`: how a task's texts become ids, and its scores an answer. Every key optional."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    labels: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = Field(
        None, description="Label names by index. Else from the folder's config.json, else LABEL_0…"
    )
    problem_type: ProblemType | None = Field(
        None, description="Else by the adapter's task_type, from config.json, or guessed: one "
        "label is regression."
    )  # fmt: skip
    threshold: Threshold | None = Field(
        None, description='Of all labels, or one a label. Under it a single label is "Uncertain", '
        "one of several labels and an entity are left out. Labels without one: several labels "
        "0.5, else any score will do."
    )  # fmt: skip
    max_length: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Longest input in tokens, as in training. Else where the folder's tokenizer "
        "cut, else what the base can take.",
    )
    truncation: Truncation = Field(
        True, description="How a longer text is cut, as in training; false refuses it instead. "
        "Of a pair, windows go over the text that this names, else the first."
    )  # fmt: skip
    overflow: Overflow | None = Field(
        None, description="A longer text is cut, refused, or read in windows; else cut."
    )
    stride: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Tokens that neighbouring windows share; else a quarter of max_length."
    )
    window_scores: WindowScores | None = Field(
        None, description="How the scores of windows become a text's; else max."
    )
    negative_label: str | None = Field(
        None, description="The label of a text in which nothing was found. Of a single label, "
        "max takes the window where it is least likely."
    )  # fmt: skip
    aggregation: Aggregation | None = Field(
        None, description="How classified tokens become entities, as in transformers' pipeline; "
        "else simple."
    )  # fmt: skip
    priority: Priority | None = Field(
        None, description="Whose texts go first where not all can go at once; else normal. A "
        "lower one keeps a share of the time."
    )  # fmt: skip
    latency_target_ms: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Milliseconds in which a text should be answered: while texts of this task "
        "come, no batch takes much of it. It costs throughput; whether it is kept, load decides.",
    )
    padding: bool | Literal["longest", "max_length", "do_not_pad"] = Field(
        True, description="Accepted and without effect: padding never changes an answer here."
    )
    pair: bool = Field(False, description="Whether an input is a pair: a text and a text_pair.")
    base_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        None, description="SHA-256 of the base's model.safetensors, checked where present."
    )

    @property
    def revision(self) -> str:
        """First 8 hex digits of a SHA-256 of these rules; a default is no rule."""
        said = self.model_dump(mode="json", exclude_defaults=True)
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and len(set(labels)) < len(labels):
            raise ValueError("label names must differ from each other")
        return labels

    def problems(self, problem_type: ProblemType, labels: Sequence[str]) -> list[str]:
        """Say which rules contradict each other, the kind of problem, or its labels."""
        said = [
            *self._overflow_problems(problem_type),
            *self._label_problems(problem_type, labels),
            *self._hurry_problems(),
        ]
        return [f"task.json: {sentence}" for sentence in said]

    def _overflow_problems(self, problem_type: ProblemType) -> Iterator[str]:
        if self.truncation is False and self.overflow in ("truncate", "window"):
            yield f'truncation false refuses long texts, overflow "{self.overflow}" does not'
        if self.overflow != "window":
            for name in ("stride", "window_scores", "negative_label"):
                if getattr(self, name) is not None:
                    yield f'{name} means nothing without overflow "window"'
            return
        if self.stride is not None and self.max_length and self.stride >= self.max_length:
            yield f"stride {self.stride} must be under max_length {self.max_length}"
        if self.pair and self.truncation == "longest_first":
            yield (
                "windows go over one text of a pair; truncation must be only_first or only_second"
            )
        if problem_type == "token_classification" and self.window_scores is not None:
            yield "window_scores means nothing for token classification: no window has them all"
        watched = problem_type == "single_label_classification" and self.window_scores != "mean"
        if watched and self.negative_label is None:
            # Of the most confident window a harmless one would win over the bad one.
            yield (
                "windows of a single-label task need negative_label, the label of a text in which "
                'nothing was found, or window_scores "mean"'
            )
        if not watched and self.negative_label is not None:
            yield 'negative_label means nothing but for window_scores "max" of a single label'

    def _hurry_problems(self) -> Iterator[str]:
        if self.priority == "low" and self.latency_target_ms is not None:
            yield 'latency_target_ms means nothing for priority "low", which waits for all others'

    def _label_problems(self, problem_type: ProblemType, labels: Sequence[str]) -> Iterator[str]:
        of_tokens = problem_type == "token_classification"
        if self.aggregation is not None and not of_tokens:
            yield f"aggregation means nothing for {problem_type}"
        if self.pair and of_tokens:
            yield "pair is not served for token classification"
        if self.negative_label is not None and self.negative_label not in labels:
            yield f"negative_label {self.negative_label!r} is not a label"
        if self.threshold is not None and problem_type == "regression":
            yield "threshold means nothing for a regression"
        elif isinstance(self.threshold, dict):
            grouped = of_tokens and self.aggregation != "none"
            known = [entity_label(label) for label in labels] if grouped else labels
            unknown = [name for name in self.threshold if name not in known]
            if unknown:
                yield f"threshold names {', '.join(unknown)}, which no answer can have"


def entity_label(label: str) -> str:
    """Return what an entity of several tokens is called: a label without its `B-` or `I-`.

    transformers cuts at the first hyphen whatever stands before it, and so do we.
    """
    return label.split("-", 1)[-1]


def lay_over(task_json: bytes, rules: Mapping[str, Any]) -> bytes:
    """Lay rules over a `task.json`, key by key.

    One that holds no JSON object comes back as it is, for who validates it to say so.
    """
    try:
        own = json.loads(task_json)
    except (ValueError, RecursionError):
        return task_json
    return json.dumps({**own, **rules}).encode() if rules and isinstance(own, dict) else task_json


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
