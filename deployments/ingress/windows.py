"""What the windows of a long text say together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from deployments.rows import Facts
from deployments.spans import Span
from deployments.tokens import Encoded


class Piece(NamedTuple):
    """A token of a text with its scores, one a label."""

    span: Span
    scores: list[float]


def combine(facts: Facts, windows: Sequence[list[float]]) -> list[float]:
    """Make one text's scores of those of its windows.

    `mean` takes each label's mean; of probabilities that sum to 1 it does too. `max` takes each
    label's highest score, where the labels are independent of each other: of several labels, and
    of a regression's values.

    Of a single label, `max` takes all scores of the window in which `negative_label` is least
    likely. A maximum of each label would not do: 0.99 "safe" in a harmless window would hide 0.98
    "unsafe" in the bad one, renormalised or not. Nothing is renormalised: the scores are one
    window's softmax, so that a threshold means what it means for a short text.

    Args:
        facts: The task.
        windows: Scores of each window, one a label.
    """
    if len(windows) == 1:
        return windows[0]
    if facts["window_scores"] == "mean":
        return [sum(scores) / len(scores) for scores in zip(*windows, strict=True)]
    if facts["negative_label"] is not None:
        negative = facts["labels"].index(facts["negative_label"])
        return min(windows, key=lambda scores: scores[negative])
    return [max(scores) for scores in zip(*windows, strict=True)]


def stitch(windows: Sequence[Encoded], scores: Sequence[list[list[float]]]) -> list[Piece]:
    """Put a text's tokens together, each from the window that shows most on both sides of it.

    Args:
        windows: Windows with their spans.
        scores: Of each window's tokens, special tokens included, one a label.

    Returns:
        The text's tokens in their order, no special tokens among them.
    """
    best: dict[int, tuple[int, Piece]] = {}
    for window, rows in zip(windows, scores, strict=True):
        spans = window.spans or []
        pieces = [
            Piece(span, row) for span, row in zip(spans, rows, strict=True) if span is not None
        ]
        for place, piece in enumerate(pieces):
            context = min(place, len(pieces) - 1 - place)
            known = best.get(window.first + place)
            if known is None or context > known[0]:
                best[window.first + place] = (context, piece)
    return [best[place][1] for place in sorted(best)]
