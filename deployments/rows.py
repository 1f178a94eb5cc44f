"""The types that ingress, queue and engine share. No torch, no ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from adapters.rules import Aggregation, Overflow, Priority, ProblemType, WindowScores


class Tokens(NamedTuple):
    """One input as the base reads it, special tokens included, not padded.

    Attributes:
        ids: Token ids, [tokens].
        type_ids: Segment ids, [tokens], or None where all are 0.
    """

    ids: list[int]
    type_ids: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One input with the slot that answers it.

    Attributes:
        slot: The slot of its adapter, 1 or more.
        tokens: What the base reads.
        problem_type: How logits become scores.
        share: Its task, which has a fair share of the service whatever the others ask for.
        request: Rows of a request have the same number; those of a task share alike too.
        priority: Of its task.
        deadline_s: By this process's `time.monotonic`, when nobody waits for it any more.
    """

    slot: int
    tokens: Tokens
    problem_type: ProblemType = "single_label_classification"
    share: str = ""
    request: int = 0
    priority: Priority = "normal"
    deadline_s: float | None = None

    @property
    def num_tokens(self) -> int:
        """Length before padding."""
        return len(self.tokens.ids)


class Prediction(NamedTuple):
    """A row's answer.

    Attributes:
        logits: One a label, as the head gave them, fp32; of a token classifier a list of them for
            each token.
        scores: Likewise: softmax, sigmoid, or the value itself, by problem type.
    """

    logits: list[float] | list[list[float]]
    scores: list[float] | list[list[float]]


class Facts(TypedDict):
    """What a task is, as the model told the ingress after validating its adapter.

    Attributes:
        task: Its name.
        version: 8 hex digits, see `adapters.store.Files`.
        labels: By index.
        problem_type: How logits become scores.
        threshold: The rules' own, of all labels or by label, or None.
        max_length: Longest input in tokens: the rules', else what the base can take.
        truncation: `longest_first`, `only_first`, `only_second`: how a longer input is cut, and
            which text of a pair windows go over; None where `overflow` is `refuse`.
        overflow: What becomes of a longer input.
        stride: Tokens that neighbouring windows share; None where there are no windows.
        window_scores: How the scores of windows become a text's; None where nothing combines them.
        negative_label: `max` takes the window of a single label where this is least likely.
        aggregation: How classified tokens become entities; None for other kinds of problem.
        pair: Whether an input is a pair of texts.
        priority: Whose rows go first.
        latency_target_ms: In how many a row should be answered; None if nothing is said.
        guessed: Which of labels, problem_type and max_length nothing in the folder says.
        rules: First 8 hex digits of a SHA-256 of the effective rules.
        method: `lora`, `dora`, `ia3`.
        rank: LoRA rank, 0 for IA3.
        targets: The modules that the adapter changes.
        num_bytes: Size of the adapter's tensors.
    """

    task: str
    version: str
    labels: list[str]
    problem_type: ProblemType
    threshold: float | dict[str, float] | None
    max_length: int
    truncation: str | None
    overflow: Overflow
    stride: int | None
    window_scores: WindowScores | None
    negative_label: str | None
    aggregation: Aggregation | None
    pair: bool
    priority: Priority
    latency_target_ms: int | None
    guessed: list[str]
    rules: str
    method: str
    rank: int
    targets: list[str]
    num_bytes: int


class Residency(TypedDict):
    """What a model replica says of the versions in its slots.

    Attributes:
        number: Of the last change that is in it.
        whole: Whether it is all that the replica holds, else what has changed.
        held: By `task@version`, whether it is resident.
        crowded: Whether a newcomer has pushed another out.
    """

    number: int
    whole: bool
    held: dict[str, bool]
    crowded: bool


class Parcel(NamedTuple):
    """Rows of one version on their way to a model replica.

    Attributes:
        task: The task.
        version: The version that must answer; no other will.
        problem_type: How its logits become scores.
        priority: As the task's rules say.
        latency_target_ms: Likewise.
        rows: Of each its id, which is the sender's own; ids and type ids, as in `Tokens`; the
            number of its question, likewise the sender's; and in how many seconds nobody waits for
            it any more, None if somebody always does.
    """

    task: str
    version: str
    problem_type: ProblemType
    priority: Priority
    latency_target_ms: int | None
    rows: list[tuple[int, list[int], list[int] | None, int, float | None]]


Answer = list[float] | list[list[float]] | str


class Reply(TypedDict):
    """What a model replica has for an ingress.

    Attributes:
        replica: Its name.
        answers: (id, answer) of rows: the scores, one a label, of a token classifier a list of
            them for each token; or a sentence where the row alone failed.
        failed: Ids of rows with the error that befell them.
        residency: What has changed since the ingress last heard, None if nothing has.
    """

    replica: str
    answers: list[tuple[int, Answer]]
    failed: list[tuple[list[int], Exception]]
    residency: Residency | None
