"""Bars side by side, the shape that most answers have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def bars(axes: Any, groups: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> None:
    """Draw a bar of every series in every group, its value above it; None leaves it out."""
    width = 0.8 / len(series)
    crowded = len(groups) * len(series) > 16
    for index, (name, values) in enumerate(series.items()):
        places = [group + (index + 0.5) * width - 0.4 for group in range(len(groups))]
        there = [(x, y) for x, y in zip(places, values, strict=True) if y is not None]
        drawn = axes.bar(*zip(*there, strict=True), width * 0.92, label=name)
        axes.bar_label(drawn, fmt="{:.3g}", fontsize=7, padding=2, rotation=90 * crowded)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    if len(series) > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=len(series))
