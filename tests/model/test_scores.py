import math

import pytest
import torch

from deployments.model.scores import to_predictions
from deployments.rows import ProblemType, Row, Tokens

SINGLE: ProblemType = "single_label_classification"
MULTI: ProblemType = "multi_label_classification"
REGRESSION: ProblemType = "regression"


def row(problem_type: ProblemType) -> Row:
    return Row(1, Tokens([1]), problem_type)


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(value - top) for value in logits]
    return [power / sum(powers) for power in powers]


def sigmoid(logits: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-value)) for value in logits]


def test_one_batch_scores_every_row_by_its_own_problem_type() -> None:
    torch.manual_seed(0)
    kinds = [SINGLE, MULTI, REGRESSION, SINGLE, MULTI, REGRESSION, SINGLE]
    counts = [2, 3, 1, 5, 1, 4, 1]
    logits = torch.randn(len(kinds), 5) * 3
    predictions = to_predictions(logits, counts, [row(kind) for kind in kinds])
    oracle = {SINGLE: softmax, MULTI: sigmoid, REGRESSION: list}
    for own, kind, count, prediction in zip(
        logits.tolist(), kinds, counts, predictions, strict=True
    ):
        assert prediction.logits == own[:count]
        assert prediction.scores == pytest.approx(oracle[kind](own[:count]), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_scores(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]] * 3, dtype=dtype)
    kinds = [row(SINGLE), row(MULTI), row(REGRESSION)]
    single, multi, regression = to_predictions(logits, [3, 3, 3], kinds)
    assert single.scores == [1.0, 0.0, 0.0]
    assert multi.scores == [1.0, 0.0, 0.5]
    assert regression.scores == pytest.approx([1e4, -1e4, 0.0], rel=0.01)


def test_all_very_negative_logits_still_sum_to_one() -> None:
    logits = torch.tensor([[-1e4, -1e4, 0.0]])  # the 0 lies beyond the row's own labels
    (prediction,) = to_predictions(logits, [2], [row(SINGLE)])
    assert prediction.scores == [0.5, 0.5]


@pytest.mark.parametrize("beyond", [1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
def test_labels_beyond_a_rows_own_never_count(kind: ProblemType, beyond: float) -> None:
    logits = torch.tensor([[0.3, -0.2, beyond, beyond]])
    (prediction,) = to_predictions(logits, [2], [row(kind)])
    (alone,) = to_predictions(logits[:, :2], [2], [row(kind)])
    assert prediction == alone
    assert len(prediction.scores) == len(prediction.logits) == 2


def test_a_neighbours_logits_never_count() -> None:
    logits = torch.tensor([[0.3, -0.2], [1e4, float("nan")]])
    first, _ = to_predictions(logits, [2, 2], [row(SINGLE)] * 2)
    (alone,) = to_predictions(logits[:1], [2], [row(SINGLE)])
    assert first == alone
