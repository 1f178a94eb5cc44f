"""`golden.jsonl`: scores that a version had where it was made, and must have here as well."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.store import GOLDEN
from deployments.errors import BadInput
from deployments.ingress.results import Judged, to_judged
from deployments.ingress.runs import Runs
from deployments.ingress.wire import Pair, PredictRequest
from deployments.rows import Facts

_MAX_LINES = 10_000
# Of more a caller reads none, and the lines that are left are not run.
_MAX_PROBLEMS = 64
# Lines that are asked for at a time: a few forwards, between which others get their turn.
_LINES = 64
Score = Annotated[float, Field(allow_inf_nan=False)]


class GoldenLine(BaseModel):
    """A line of `golden.jsonl`: an input, and what its scores are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str | Pair
    scores: dict[str, Score] | list[Score] = Field(
        description="By label, of some or all of them; or of all in their order.", min_length=1
    )
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        1e-3, description="How far a score may be off."
    )


def read_golden(content: bytes) -> tuple[list[tuple[int, GoldenLine]], list[str]]:
    """Return the lines with their numbers, blank ones left out, and a sentence for each bad one."""
    lines, problems = [], list[str]()
    split = content.splitlines()
    if len(split) > _MAX_LINES:
        return [], [f"{GOLDEN} has {len(split)} lines, over the limit of {_MAX_LINES}"]
    for number, line in enumerate(split, start=1):
        if not line.strip():
            continue
        try:
            lines.append((number, GoldenLine.model_validate_json(line)))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            problems.append(_at(number, f"{where}: {first['msg']}" if where else first["msg"]))
    return lines, problems


async def try_golden(content: bytes, facts: Facts, runs: Runs) -> list[str]:
    """Run golden lines through a version.

    Args:
        content: The file's.
        facts: The version that must answer, under the rules that are to hold.
        runs: Asks it.

    Returns:
        A sentence for each line that is none or misses, for 64 of them and then how many more are
        known; empty if all hold.

    Raises:
        NotReady: No model replica could be asked.
        AdapterError: The version cannot be had.
    """
    if facts["problem_type"] == "token_classification":
        return [f"{GOLDEN} says scores of whole texts; a token classifier has none"]
    lines, problems = await asyncio.to_thread(read_golden, content)
    if not lines and not problems:
        return [f"{GOLDEN} has no line"]
    num_tried = 0
    while num_tried < len(lines) and len(problems) < _MAX_PROBLEMS:
        problems += await _misses(lines[num_tried : num_tried + _LINES], facts, runs)
        num_tried += _LINES
    return _few(problems, max(0, len(lines) - num_tried))


def _few(problems: list[str], num_untried: int) -> list[str]:
    """Cut problems to those that somebody reads, and say what is left out."""
    told = problems[:_MAX_PROBLEMS]
    if len(problems) > _MAX_PROBLEMS:
        told.append(f"and {len(problems) - _MAX_PROBLEMS} more")
    if num_untried:
        told.append(f"the last {num_untried} lines of {GOLDEN} were not tried")
    return told


async def _misses(lines: Sequence[tuple[int, GoldenLine]], facts: Facts, runs: Runs) -> list[str]:
    request = PredictRequest.model_validate({"texts": [line.text for _, line in lines]})
    try:
        run = await runs.run(facts, request)
    except BadInput as error:
        if len(lines) == 1:
            return [_at(lines[0][0], error.detail)]
        # One of them does not fit the task; find out which.
        return [problem for line in lines for problem in await _misses([line], facts, runs)]
    failed = [one if isinstance(one, str) else "" for one in run.of_inputs()]
    return [
        _at(number, problem)
        for (number, line), judged, why in zip(lines, to_judged(run), failed, strict=True)
        for problem in ([why] if judged is None else _compare(line, judged, facts["labels"]))
    ]


def _compare(line: GoldenLine, judged: Judged, labels: list[str]) -> list[str]:
    """Say which score is furthest off, if it is further than it may be."""
    expected = line.scores
    if isinstance(expected, list):
        if len(expected) != len(labels):
            return [f"it has {len(expected)} scores, the task {len(labels)} labels"]
        expected = dict(zip(labels, expected, strict=True))
    unknown = [label for label in expected if label not in judged.scores]
    if unknown:
        return [f"{unknown[0]!r} is no label of the task, whose labels are {', '.join(labels)}"]
    apart = {label: abs(judged.scores[label] - score) for label, score in expected.items()}
    misses = [label for label in apart if not apart[label] <= line.tolerance]  # NaN is one
    if not misses:
        return []
    label = max(misses, key=apart.__getitem__)
    return [
        f"{label!r} is {judged.scores[label]:.6g} here and {expected[label]:.6g} in the file, "
        f"{apart[label]:.3g} apart, over the tolerance of {line.tolerance:.3g}"
    ]


def _at(number: int, problem: str) -> str:
    return f"{GOLDEN} line {number}: {problem}"
