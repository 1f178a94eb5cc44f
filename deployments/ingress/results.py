"""What the model answered, shaped as an answer to the caller."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from deployments.ingress.calls import Answers
from deployments.ingress.entities import find_entities
from deployments.ingress.inputs import Given
from deployments.ingress.windows import combine, stitch
from deployments.ingress.wire import PredictRequest, to_result, to_token_result
from deployments.rows import Facts
from deployments.tokens import Encoded


class Run(NamedTuple):
    """A request's way through one version.

    Attributes:
        facts: The version's.
        request: The request.
        inputs: Its inputs, as the tokenizer reads them.
        encoded: Of each its windows, or a sentence where it cannot be read.
        answers: The model's, of all windows in their order.
        tokenize_s: Seconds until all was encoded.
        model_s: Seconds from then until all was answered.
    """

    facts: Facts
    request: PredictRequest
    inputs: Sequence[Given]
    encoded: Sequence[list[Encoded] | str]
    answers: Answers
    tokenize_s: float
    model_s: float

    @property
    def num_tokens(self) -> int:
        """Tokens that the model read."""
        return sum(
            len(row.tokens.ids)
            for windows in self.encoded
            if not isinstance(windows, str)
            for row in windows
        )

    def of_inputs(self) -> Iterator[tuple[Given, list[Encoded], list[Any]] | str]:
        """Go through the inputs: each with windows and their answers, or why it has none."""
        rest = iter(self.answers)
        for given, windows in zip(self.inputs, self.encoded, strict=True):
            if isinstance(windows, str):
                yield windows
                continue
            own = [next(rest) for _ in windows]
            problem = next((answer for answer in own if isinstance(answer, str)), None)
            yield (given, windows, own) if problem is None else problem

    def count_rows(self) -> tuple[int, int]:
        """Return how many inputs reached the model, and how many of them failed in it."""
        reached = sum(not isinstance(windows, str) for windows in self.encoded)
        if not any(isinstance(answer, str) for answer in self.answers):
            return reached, 0
        return reached, reached - sum(not isinstance(one, str) for one in self.of_inputs())


def to_results(run: Run) -> list[dict[str, Any]]:
    """Shape the answer of each input, or say why it has none."""
    results: list[dict[str, Any]] = []
    for one in run.of_inputs():
        if isinstance(one, str):
            results.append({"error": one})
            continue
        given, windows, answers = one
        result = _result(run, given, windows, answers)
        if len(windows) > 1:
            result["windows"] = len(windows)
        elif windows[0].truncated:
            result["truncated"] = True
        if given.num_replaced:
            result["replaced_characters"] = given.num_replaced
        results.append(result)
    return results


class Judged(NamedTuple):
    """What a version makes of one input, to be compared with what another one does.

    Attributes:
        prediction: As the caller gets it; of classified tokens without scores.
        scores: By label; of classified tokens by label and place.
    """

    prediction: object
    scores: Mapping[Hashable, float]


def to_judged(run: Run) -> list[Judged | None]:
    """Return what a run makes of each input, None where it failed."""
    return [None if isinstance(one, str) else _judge(run, *one) for one in run.of_inputs()]


def _judge(run: Run, given: Given, windows: Sequence[Encoded], answers: list[Any]) -> Judged:
    prediction = _result(run, given, windows, answers)["prediction"]
    facts = run.facts
    if facts["aggregation"] is None:
        scores = combine(facts, answers)
        return Judged(prediction, dict(zip(facts["labels"], scores, strict=True)))
    places: dict[Hashable, float] = {
        (one["label"], one["start"], one["end"]): one["score"] for one in prediction
    }
    return Judged(list(places), places)


def _result(
    run: Run, given: Given, windows: Sequence[Encoded], answers: list[Any]
) -> dict[str, Any]:
    facts, request = run.facts, run.request
    if facts["aggregation"] is not None and isinstance(given.text, str):
        pieces = stitch(windows, answers)
        entities = find_entities(pieces, facts["labels"], facts["aggregation"])
        return to_token_result(facts, given.text, entities, threshold=request.threshold)
    return to_result(
        facts,
        combine(facts, answers),
        return_scores=request.return_scores,
        threshold=request.threshold,
    )
