"""Plots, from what was saved: the same rows give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks import question
from benchmarks.record import RESULTS

STYLE = {
    "svg.hashsalt": "onebase",  # ids would be random
    "svg.fonttype": "none",  # text stays text: small, and it can be searched
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial"],
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "figure.facecolor": "white",  # readable on a dark page too
    "axes.prop_cycle": matplotlib.cycler(
        color=["#1b6ca8", "#e07b39", "#3a9d6e", "#8a5fb0", "#b8b03a", "#7a7a7a"]
    ),
}
UNSAID = ("Date", "Creator", "Format", "Type")


def save_plot(name: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Write results/{name}.svg."""
    path = RESULTS / f"{name}.svg"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        question(name).draw(rows, figure)
        figure.savefig(path, format="svg", metadata=dict.fromkeys(UNSAID))
    return path
