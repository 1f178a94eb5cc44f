"""One module, one question; `python -m benchmarks` answers them all.

A question's docstring asks it, and says how it is answered. It has

    measure() -> Iterator[row]     what is found, a JSON object a measurement
    as_table(rows) -> str          in Markdown
    draw(rows, figure)             on an empty matplotlib figure
    in_short(rows) -> str          for README.md; "" where no buyer would ask
    PACKAGES                       whose versions count, beside torch's own kin; may be left out

and everything but `measure` works from what was saved, without the machine that measured it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

QUESTIONS = (
    "mixing",
    "int8",
    "padding",
    "cliff",
    "many",
    "resident",
    "guide",
    "stages",
    "threads",
    "serving",
    "placement",
    "flood",
)


def question(name: str) -> ModuleType:
    """Return the module that asks it."""
    return importlib.import_module(f"benchmarks.{name}")
