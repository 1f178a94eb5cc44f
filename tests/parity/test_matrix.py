"""Every cell of architecture × variant × quantisation is right, or refused, as is declared.

One engine of a quantisation has all adapters of a base in its slots and answers a batch of rows of
all of them; PEFT answers for each adapter alone. Without quantisation the two agree at any padding.
With it PEFT runs over copies of the engine's quantised linears, at the same padded shape; where an
int8 value still rounded the other way (see test_parity.py in tests/model), PEFT must arrive at the
input of every quantised linear by itself and goes on with the engine's.
"""

from collections.abc import Callable

import pytest
import torch

from deployments.rows import Row
from tests.parity.bases import Base
from tests.parity.board import WIDTHS, Board
from tests.parity.cells import CELLS, Cell, is_covering
from tests.parity.conftest import FEWEST
from tests.parity.expectations import PeftCannot, Refused
from tests.parity.making import Made, answer, probe, without_tuners
from tests.parity.oracle import Oracle
from tests.parity.report import Report
from tests.parity.variants import Variant

BOUND = 2e-4
MOVES = 100 * BOUND  # what an adapter must change for a test of it to mean anything


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=cell.name, marks=[] if is_covering(cell) else pytest.mark.slow)
        for cell in CELLS
    ],
)
def test_cell(
    cell: Cell,
    base_folder: Callable[[Base, str], str],
    made: Callable[[Base, Variant], Made | Exception],
    board_of: Callable[[Cell], Board],
    report: Report,
) -> None:
    want, found = cell.variant.expectation(cell.base), made(cell.base, cell.variant)
    if isinstance(want, PeftCannot):
        assert isinstance(found, Exception), "PEFT can by now"
        assert want.words in str(found)
        report.peft_cannot(cell, found)
        return
    if isinstance(found, Exception):
        raise found
    board = board_of(cell)
    refusal = board.refused.get(cell.variant.name)
    if isinstance(want, Refused):
        assert refusal is not None, "it is served, and was to be refused"
        sentences = [problem for problem in refusal.problems if want.words in problem]
        assert sentences, refusal.problems
        report.refused(cell, sentences[0])
        return
    if refusal is not None:
        pytest.fail(str(refusal), pytrace=False)
    if len(board.slots) < FEWEST:
        pytest.fail(f"no mixed batch: the engine takes {[*board.slots]} alone", pytrace=False)
    oracle = Oracle.over(
        base_folder(cell.base, cell.variant.form), cell.variant, found, board.engine
    )
    worst, forced = difference(cell, board, oracle, found.num_labels)
    if cell.quantization == "none":
        check_oracle(oracle, found)
    report.right(cell, worst, forced)


def difference(cell: Cell, board: Board, oracle: Oracle, num_labels: int) -> tuple[float, bool]:
    """Return the worst difference at any width, and whether inputs had to be forced."""
    worst, forced = 0.0, False
    places = board.places(cell.variant.name)
    rows = [board.rows[place] for place in places]
    for width in WIDTHS:
        logits, inputs = board.answers[width]
        got = [logits[place] for place in places]
        asked = max(row.num_tokens for row in rows) if cell.quantization == "none" else width
        error = largest_error(rows, got, oracle.ask(rows, asked), num_labels)
        if cell.quantization == "int8" and error > BOUND:
            want = oracle.ask_forced(rows, width, inputs, places, len(board.rows))
            error, forced = largest_error(rows, got, want, num_labels), True
        assert error <= BOUND, f"differs by {error:.1e} at {width} tokens"
        worst = max(worst, error)
    return worst, forced


def largest_error(
    rows: list[Row], got: list[torch.Tensor], want: list[torch.Tensor], num_labels: int
) -> float:
    errors = []
    for row, ours, theirs in zip(rows, got, want, strict=True):
        assert ours.shape[-1] >= num_labels
        assert theirs.shape[-1] == num_labels
        assert not ours[..., num_labels:].any()
        if ours.ndim == 2:  # padding has no answer
            ours, theirs = ours[: row.num_tokens], theirs[: row.num_tokens]
        assert ours.shape[:-1] == theirs.shape[:-1]
        errors.append(float((ours[..., :num_labels] - theirs).abs().max()))
    return max(errors)


def check_oracle(oracle: Oracle, found: Made) -> None:
    """Check that PEFT reads what it saved, and that a site which did not run would show."""
    assert found.logits is not None
    logits = answer(oracle.peft, probe())
    torch.testing.assert_close(logits, found.logits, atol=1e-5, rtol=0)
    without_tuners(oracle.peft)
    assert (answer(oracle.peft, probe()) - logits).abs().max() > MOVES
