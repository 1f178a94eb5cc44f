"""docs/parity.md, as a full run of the matrix found it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from tests.parity.bases import BASES, Base
from tests.parity.cells import CELLS, QUANTIZATIONS, Cell
from tests.parity.variants import VARIANTS, Variant

PATH = Path(__file__).parents[2] / "docs" / "parity.md"
REFUSED, PEFT_CANNOT = "refused", "PEFT cannot"
HEADER = f"""\
# Parity with PEFT

Written by `make test-all` when every cell came out as `tests/parity/variants.py` and
`tests/parity/methods.py` declare it: {len(BASES)} architectures, {len(VARIANTS)} kinds of adapters,
three quantisations. The models are tiny and random. One engine holds all adapters of a form of a
base and answers one batch of rows of all of them, at two widths of padding; each adapter is then
compared with PEFT running it alone on the same base.

## Served

A cell is the largest absolute difference of a logit without quantisation / with int8 / with nf4; at
most 2e-4 is let pass. Quantised, PEFT runs over the very same quantised linears at the same padded
shape. An asterisk: an int8 value on the boundary between two rounded the other way, so PEFT went on
with the engine's inputs, at which it had arrived by itself but for rounding. A dash: it means
nothing there.

`trained-…` is on a base that has a classifier already, `token-…` labels each token, in the same
batch as the others.
"""


@dataclass
class Report:
    """What each cell turned out to be.

    Attributes:
        found: What the table says of each cell.
        said: Why it is not served, of the cells that are not.
    """

    found: dict[Cell, str] = field(default_factory=dict)
    said: dict[Cell, str] = field(default_factory=dict)

    def right(self, cell: Cell, worst: float, forced: bool) -> None:
        self.found[cell] = f"{worst:.0e}".replace("e-0", "e-") + ("\\*" if forced else "")

    def refused(self, cell: Cell, sentence: str) -> None:
        self.found[cell], self.said[cell] = REFUSED, sentence

    def peft_cannot(self, cell: Cell, error: Exception) -> None:
        words = " ".join(str(error).split())
        self.found[cell], self.said[cell] = PEFT_CANNOT, f"{type(error).__name__}: {words}"

    def is_full(self) -> bool:
        """Tell whether every cell was run, and none failed."""
        return len(self.found) == len(CELLS)

    def text(self) -> str:
        lines = [HEADER, "| | " + " | ".join(base.name for base in BASES) + " |"]
        lines.append("|---" * (1 + len(BASES)) + "|")
        for variant in VARIANTS:
            if any(cell.is_right for cell in CELLS if cell.variant == variant):
                parts = [self._entry(base, variant) for base in BASES]
                lines.append(f"| {variant.name} | " + " | ".join(parts) + " |")
        lines += ["", "## Refused", "", "Where the names of modules differ: as on the first."]
        lines += self._list(REFUSED)
        lines += ["", "## What PEFT itself cannot make, save or load", ""]
        lines += self._list(PEFT_CANNOT)
        return "\n".join(lines) + "\n"

    def _entry(self, base: Base, variant: Variant) -> str:
        cells = [Cell(base, quantization, variant) for quantization in QUANTIZATIONS]
        found = [self.found[cell] for cell in cells if cell in self.found]
        return " / ".join(found[:1] if cells[0] in self.said else found) or "–"

    def _list(self, verdict: str) -> list[str]:
        lines = [""] if verdict == REFUSED else []
        for variant in VARIANTS:
            cells = [c for c in CELLS if c.variant == variant and self.found[c] == verdict]
            named = [*dict.fromkeys(cell.base.name for cell in cells)]
            where = "" if len(named) == len(BASES) else f" on {', '.join(named)}"
            if cells:
                lines.append(f"- `{variant.name}`{where}: {self.said[cells[0]]}")
        return lines

    def write(self, path: Path = PATH) -> None:
        draft = path.with_name(path.name + ".draft")
        draft.write_text(self.text(), "utf-8")
        os.replace(draft, path)
