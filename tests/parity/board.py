"""One engine's side of the matrix: adapters read, put into slots, and asked in mixed batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from adapters.directory import Directory
from adapters.errors import AdapterRefused
from deployments.model.engine import Engine
from deployments.model.int8 import Int8Linear
from deployments.rows import Row, Tokens
from tests.parity.bases import FIRST_PLAIN_ID, VOCAB, Base

LENGTHS = (1, 5, 12, 23)
WIDTHS = (max(LENGTHS), 39)  # tight, and wider by what is no multiple of a vector register

Inputs = dict[str, list[torch.Tensor]]


@dataclass
class Board:
    """An engine, and what it made of the adapters that it was given.

    Attributes:
        slots: Slot of each adapter that it took.
        refused: What it said to each of the others.
        rows: The mixed batch, the adapters taking turns.
        answers: Width -> logits of each row, [labels] or [tokens, labels], and the inputs
            of every quantised linear.
    """

    engine: Engine
    slots: dict[str, int] = field(default_factory=dict)
    refused: dict[str, AdapterRefused] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    answers: dict[int, tuple[list[torch.Tensor], Inputs]] = field(default_factory=dict)

    @classmethod
    def play(cls, base: Base, engine: Engine, store: Directory, tasks: Sequence[str]) -> Board:
        """Read every adapter, and answer rows of all that were taken in one forward a width."""
        board = cls(engine)
        for slot, task in enumerate(tasks, start=1):
            try:
                engine.write(slot, engine.read(store.read(task)))
            except AdapterRefused as refusal:
                board.refused[task] = refusal
            else:
                board.slots[task] = slot
        rows = {task: rows_of(base, task, slot) for task, slot in board.slots.items()}
        board.rows = [row for turn in zip(*rows.values(), strict=True) for row in turn]
        if board.rows:
            for width in WIDTHS:
                inputs: Inputs = {}
                with recorded(quantized(engine), inputs):
                    board.answers[width] = ask(engine, board.rows, width), inputs
        return board

    def places(self, task: str) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row.slot == self.slots[task]]


def rows_of(base: Base, task: str, slot: int) -> list[Row]:
    """Rows of several lengths for an adapter, the same at every call; some are pairs."""
    dice = random.Random(task)
    rows = []
    for length in LENGTHS:
        ids = dice.choices(range(FIRST_PLAIN_ID, VOCAB), k=length)
        second = [int(2 * index >= length) for index in range(length)]
        rows.append(Row(slot, Tokens(ids, second if base.segments and length == 12 else None)))
    return rows


def ask(engine: Engine, rows: Sequence[Row], width: int) -> list[torch.Tensor]:
    """The logits of each row of a mixed batch, whose rows may be of texts or of their tokens."""
    with torch.inference_mode():
        parts = [iter(part if part is not None else ()) for part in engine.forward(rows, width)]
    return [next(parts[engine._of_tokens(row)]) for row in rows]


def quantized(engine: Engine) -> dict[str, nn.Module]:
    """The quantised linears of an engine by the path that transformers gives them."""
    if engine.quantization == "none":
        return {}
    found: dict[str, nn.Module] = {}
    model = engine.encoder.model
    with torch.device("meta"):
        paths = {path for path, _ in type(model)(model.config).named_modules()}
    for path, module in model.named_modules():
        if isinstance(module, Int8Linear) or type(module).__module__.startswith("bitsandbytes"):
            while path not in paths:  # a site holds its linear
                path = path.rpartition(".")[0]
            found[path] = module
    assert found
    return found


@contextmanager
def recorded(modules: dict[str, nn.Module], inputs: Inputs) -> Iterator[None]:
    """Note the input of every call of some modules; shared layers are called more than once."""

    def note(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, given: inputs.setdefault(path, []).append(given[0].clone())

    with hooked((module, note(path)) for path, module in modules.items()):
        yield


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., object]]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield
