"""Logits to predictions, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deployments.rows import Prediction, Row


class NoNumber(ArithmeticError):
    """A row for which the model gave NaN or infinity, which says nothing; the message says so."""


def to_predictions(
    logits: torch.Tensor, num_labels: Sequence[int], rows: Sequence[Row]
) -> list[Prediction | Exception]:
    """Score a batch, each row by its own problem type.

    Args:
        logits: [rows, most labels], of token classifiers [rows, tokens, most labels], fp32, any
            device; a row's labels beyond its own, and tokens of padding, are ignored.
        num_labels: Labels of each row.
        rows: The rows, for their problem types.

    Returns:
        A prediction a row: softmax for one label of many (stable for any logits), sigmoid for
        any of many, the logits themselves for regression; of a token classifier the softmax of
        each token. `NoNumber` in the place of one whose logits are not finite.
    """
    if logits.ndim == 3:
        return [
            _of_tokens(one[: row.num_tokens, :count])
            for one, count, row in zip(logits.cpu(), num_labels, rows, strict=True)
        ]
    logits = logits.float().cpu()
    counts = torch.tensor(num_labels).unsqueeze(1)
    absent = torch.arange(logits.shape[1]).unsqueeze(0) >= counts
    finite = (logits.isfinite() | absent).all(dim=1).tolist()
    softmax = logits.masked_fill(absent, float("-inf")).softmax(dim=1).tolist()
    sigmoid = logits.sigmoid().tolist()
    predictions: list[Prediction | Exception] = []
    for index, (values, count, row) in enumerate(
        zip(logits.tolist(), num_labels, rows, strict=True)
    ):
        if not finite[index]:
            predictions.append(_no_number())
            continue
        if row.problem_type == "single_label_classification":
            scores = softmax[index][:count]
        elif row.problem_type == "multi_label_classification":
            scores = sigmoid[index][:count]
        else:
            scores = values[:count]
        predictions.append(Prediction(values[:count], scores))
    return predictions


def _of_tokens(logits: torch.Tensor) -> Prediction | Exception:
    """Score one row's tokens, [tokens, labels]."""
    if not logits.isfinite().all():
        return _no_number()
    return Prediction(logits.tolist(), logits.softmax(dim=1).tolist())


def _no_number() -> NoNumber:
    return NoNumber("the model gave no number for this input, but NaN or infinity")
