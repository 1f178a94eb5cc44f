"""docs/parity.md, as a full run of the matrix found it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import AdapterRefused
from tests.parity.bases import BASES, Base
from tests.parity.cells import CELLS, QUANTIZATIONS, Cell
from tests.parity.variants import VARIANTS, Variant

PATH = Path(__file__).parents[2] / "docs" / "parity.md"
HEADER = """\
# Parity with PEFT

Written by `make test-all`; what is not in this table is not promised. Every architecture is tiny
and random. One engine holds all adapters of a column and answers one mixed batch; each adapter is
then compared with PEFT running it alone on the same base.

A cell is the largest absolute difference of a logit without quantisation / with int8 / with nf4,
where at most 2e-4 is let pass. Quantised, PEFT runs over the very same quantised linears at the
same padded shape. An asterisk: an int8 value on the boundary rounded the other way, so PEFT went on
with the engine's inputs, at which it had arrived by itself but for rounding. A dash: it means
nothing there.
"""


@dataclass
class Report:
    """What each cell turned out to be.

    Attributes:
        found: What the table says of each cell.
        notes: The sentences that it refers to, each with the cells that said it.
    """

    found: dict[Cell, str] = field(default_factory=dict)
    notes: dict[tuple[str, str], list[Cell]] = field(default_factory=dict)

    def right(self, cell: Cell, worst: float, forced: bool) -> None:
        self.found[cell] = f"{worst:.0e}" + ("\\*" if forced else "")

    def refused(self, cell: Cell, refusal: AdapterRefused) -> None:
        self._note(cell, "refused", "; ".join(refusal.problems))

    def peft_cannot(self, cell: Cell, error: Exception) -> None:
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        self._note(cell, "PEFT cannot", said)

    def _note(self, cell: Cell, verdict: str, sentence: str) -> None:
        self.found[cell] = verdict
        self.notes.setdefault((verdict, sentence), []).append(cell)

    def is_full(self) -> bool:
        """Tell whether every cell was run, and none failed."""
        return len(self.found) == len(CELLS)

    def text(self) -> str:
        lines = [HEADER, "| | " + " | ".join(base.name for base in BASES) + " |"]
        lines.append("|---" * (1 + len(BASES)) + "|")
        for variant in VARIANTS:
            parts = [self._entry(base, variant) for base in BASES]
            lines.append(f"| {variant.name} | " + " | ".join(parts) + " |")
        for verdict, title in (("refused", "Refused"), ("PEFT cannot", "What PEFT itself cannot")):
            lines += ["", f"## {title}", ""]
            lines += sorted(
                f"- {_names(cells)}: {sentence}"
                for (said, sentence), cells in self.notes.items()
                if said == verdict
            )
        return "\n".join(lines) + "\n"

    def _entry(self, base: Base, variant: Variant) -> str:
        cells = [Cell(base, quantization, variant) for quantization in QUANTIZATIONS]
        said = [self.found[cell] for cell in cells if cell in self.found]
        return " / ".join(said if len(set(said)) > 1 else said[:1]) or "–"

    def write(self, path: Path = PATH) -> None:
        draft = path.with_name(path.name + ".draft")
        draft.write_text(self.text(), "utf-8")
        os.replace(draft, path)


def _names(cells: list[Cell]) -> str:
    """The variants of some cells, with their architectures unless those are all."""
    variants = {cell.variant.name: None for cell in cells}
    bases = {cell.base.name: None for cell in cells}
    named = ", ".join(f"`{name}`" for name in variants)
    return named if len(bases) == len(BASES) else f"{named} on {', '.join(bases)}"
