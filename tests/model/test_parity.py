"""The engine against PEFT, one adapter at a time, on the held-out texts of the examples.

PEFT runs over the engine's own quantised modules at the same padded shape. Without quantisation,
and with nf4, that is all: the logits agree to the last bits.

int8 needs one more thing. PEFT's product x·A·B is a 2-D gemm where ours is a bmm for each row, and
the two differ by 1e-8. An activation that lies on the boundary between two int8 values then rounds
up here and down there, by a whole step, and every layer above multiplies that: most rows still
agree to 1e-6, a few differ by as much as int8 costs at all. Neither side is wrong. So the engine's
forward records the input of every quantised linear, PEFT's forward must arrive at the same input
by itself, layer after layer, and goes on with the recorded one, so that both round the same way.
`test_int8_labels_…` then bounds what is left end to end when nothing is forced.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from adapters.directory import Directory
from deployments.model.engine import Engine
from deployments.rows import Row

TASKS = ("aspects", "sentiment", "spam", "topic")
NUM_ROWS = 12  # of each task in a mixed batch
MAX_TOKENS = 48  # a row; with the few that are longer, most of the work would be padding
TOLERANCE = 1e-4
INPUT_TOLERANCE = 2e-5  # times the largest value of the input

Inputs = dict[str, torch.Tensor]


@dataclass
class Side:
    """The engine of one quantisation and the runs that PEFT is held against."""

    engine: Engine
    linears: dict[str, nn.Linear]
    on_inputs: Callable[..., Any]
    num_labels: dict[str, int]

    def run(self, rows: Sequence[Row], width: int) -> tuple[torch.Tensor, Inputs]:
        """Returns logits, and the input of every linear of the base, padded; padding is 0."""
        inputs: Inputs = {}
        with torch.inference_mode(), self.on_inputs(self.linears, inputs.__setitem__):
            logits = self.engine.logits(rows, width)
        lengths = [row.num_tokens for row in rows]
        return logits, {path: padded(x, lengths, width) for path, x in inputs.items()}


def padded(x: torch.Tensor, lengths: Sequence[int], width: int) -> torch.Tensor:
    """Puts what the engine has as [tokens of all rows, in] as PEFT has it; leaves a pooled one."""
    if len(x) == len(lengths):
        return x.flatten(0, -2)
    rows = x.reshape(-1, x.shape[-1])[: sum(lengths)].split(lengths)
    return torch.stack([functional.pad(row, (0, 0, 0, width - len(row))) for row in rows])


@pytest.fixture(scope="module", params=["none", "int8", "nf4"])
def side(
    request: pytest.FixtureRequest,
    example_engine: Callable[[str], Engine],
    base_linears: Callable[[Engine], dict[str, nn.Linear]],
    on_inputs: Callable[..., Any],
    example_labels: dict[str, int],
) -> Side:
    engine = example_engine(request.param)
    return Side(engine, base_linears(engine), on_inputs, example_labels)


@pytest.fixture(scope="module")
def rows_of(heldout: dict[str, list[Row]]) -> dict[str, list[Row]]:
    assert tuple(heldout) == TASKS
    return {
        task: [row for row in rows if row.num_tokens <= MAX_TOKENS][:NUM_ROWS]
        for task, rows in heldout.items()
    }


@pytest.fixture(scope="module")
def mixed_rows(rows_of: dict[str, list[Row]]) -> list[Row]:
    """The tasks' rows one by one in turn: a, b, c, d, a, b, c, d, …."""
    return [row for turn in zip(*rows_of.values(), strict=True) for row in turn]


@pytest.fixture(scope="module")
def width(mixed_rows: list[Row]) -> int:
    return max(row.num_tokens for row in mixed_rows)


@pytest.fixture(scope="module")
def mixed(side: Side, mixed_rows: list[Row], width: int) -> tuple[torch.Tensor, Inputs]:
    return side.run(mixed_rows, width)


@pytest.fixture(scope="module")
def oracle(side: Side, example_base: str, example_store: Directory) -> Callable[[str], PeftModel]:
    """Returns PEFT's model of one task, over the very modules that the engine quantised."""

    @cache
    def load(task: str) -> PeftModel:
        model = AutoModelForSequenceClassification.from_pretrained(
            example_base, num_labels=side.num_labels[task]
        )
        if side.engine.quantization != "none":
            for path, linear in side.linears.items():
                model.set_submodule(path, linear)
            # Attention's last bits decide how int8 rounds; without quantisation they may differ.
            model.set_attn_implementation(side.engine.encoder.config._attn_implementation)
        return PeftModel.from_pretrained(model, str(example_store.root / task)).eval()

    return load


def ask(peft: PeftModel, rows: Sequence[Row], width: int) -> torch.Tensor:
    ids = torch.tensor([row.tokens.ids + [0] * (width - row.num_tokens) for row in rows])
    with torch.inference_mode():
        logits: torch.Tensor = peft(input_ids=ids, attention_mask=mask_of(rows, width)).logits
    return logits


def mask_of(rows: Sequence[Row], width: int) -> torch.Tensor:
    lengths = torch.tensor([row.num_tokens for row in rows])
    return (torch.arange(width) < lengths.unsqueeze(1)).long()


def ask_forced(
    peft: PeftModel, rows: Sequence[Row], width: int, recorded: Inputs, side: Side
) -> torch.Tensor:
    """Asks PEFT, which must arrive at the recorded inputs and then goes on with them."""
    checked = []
    real = mask_of(rows, width).bool().unsqueeze(2)

    def force(path: str, x: torch.Tensor) -> torch.Tensor:
        want = recorded[path]
        x = x * real if x.ndim == 3 else x  # padding has no say
        error = (x - want).abs().max() / want.abs().max()
        assert error <= INPUT_TOLERANCE, f"{path} sees another input: {error:.1e}"
        checked.append(path)
        return want

    with side.on_inputs(side.linears, force):
        logits = ask(peft, rows, width)
    assert sorted(checked) == sorted(side.linears)
    return logits


@pytest.mark.parametrize("batch", ["alone", "mixed"])
@pytest.mark.parametrize("task", TASKS)
def test_an_adapter_gives_the_logits_of_peft(
    task: str,
    batch: str,
    side: Side,
    oracle: Callable[[str], PeftModel],
    rows_of: dict[str, list[Row]],
    mixed: tuple[torch.Tensor, Inputs],
    width: int,
) -> None:
    rows, peft = rows_of[task], oracle(task)
    if batch == "alone":
        logits, inputs = side.run(rows, width)
    else:
        place = slice(TASKS.index(task), None, len(TASKS))
        logits = mixed[0][place]
        inputs = {path: x[place] for path, x in mixed[1].items()}
    if side.engine.quantization == "int8":
        want = ask_forced(peft, rows, width, inputs, side)
    else:
        want = ask(peft, rows, width)
    assert want.shape == (NUM_ROWS, side.num_labels[task])
    assert (logits[:, : side.num_labels[task]] - want).abs().max() <= TOLERANCE
    with peft.disable_adapter():  # if that changed little, so would a site that does not run
        assert (ask(peft, rows[:3], width) - want[:3]).abs().max() > 0.1


@pytest.mark.parametrize("side", ["int8"], indirect=True)
def test_int8_end_to_end_differs_from_peft_by_less_than_int8_costs(
    side: Side,
    oracle: Callable[[str], PeftModel],
    heldout: dict[str, list[Row]],
    example_engine: Callable[[str], Engine],
) -> None:
    errors, costs, same = [], [], []
    exact = example_engine("none")
    for task in TASKS:
        rows = sorted(heldout[task], key=lambda row: row.num_tokens)
        for start in range(0, len(rows), 16):
            batch = rows[start : start + 16]
            width = batch[-1].num_tokens
            want = ask(oracle(task), batch, width)
            logits = side.run(batch, width)[0][:, : side.num_labels[task]]
            errors.append((logits - want).abs().flatten())
            with torch.inference_mode():
                costs.append((logits - exact.logits(batch, width)[:, : want.shape[1]]).abs())
            same.append(said(task, logits) == said(task, want))
    error, cost = torch.cat(errors), torch.cat([part.flatten() for part in costs])
    assert error.median() <= 1e-5
    # An absolute bound would be one on the scale of the trained adapters' logits.
    assert error.quantile(0.99) <= 0.5 * cost.quantile(0.99)
    agreed = torch.cat([same_rows.flatten() for same_rows in same])
    assert len(agreed) > 400
    assert agreed.float().mean() >= 0.99


def said(task: str, logits: torch.Tensor) -> torch.Tensor:
    return logits > 0 if task == "aspects" else logits.argmax(dim=1)
