"""The cells of the matrix, and which of them a default run covers."""

from __future__ import annotations

from dataclasses import dataclass

from tests.parity.bases import BASES, Base
from tests.parity.expectations import Right
from tests.parity.variants import VARIANTS, Variant

QUANTIZATIONS = ("none", "int8", "nf4")
WHOLE = ("bert",)  # every variant of it is in a default run
QUANTIZED = ("bert", "deberta-v3", "llama")
EVERY = 3  # a default run has one in three of the others, each architecture other ones


@dataclass(frozen=True, repr=False)
class Cell:
    base: Base
    quantization: str
    variant: Variant

    @property
    def name(self) -> str:
        return f"{self.base.name}:{self.quantization}:{self.variant.name}"

    def __repr__(self) -> str:
        return self.name

    @property
    def is_right(self) -> bool:
        return isinstance(self.variant.expectation(self.base), Right)


CELLS = tuple(
    Cell(base, quantization, variant)
    for base in BASES
    for quantization in QUANTIZATIONS
    for variant in VARIANTS
    if variant.only(base)
)


def is_covering(cell: Cell) -> bool:
    """Tell whether a cell is in a default run."""
    if cell.quantization == "none" and cell.base.name in WHOLE:
        return True
    if cell.quantization != "none" and (cell.base.name not in QUANTIZED or not cell.is_right):
        return False  # what is refused is refused before anything is computed
    shift = BASES.index(cell.base) + QUANTIZATIONS.index(cell.quantization)
    return (VARIANTS.index(cell.variant) + shift) % EVERY == 0
