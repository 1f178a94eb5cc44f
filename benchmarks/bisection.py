"""The highest load that is held: by bisection, from a load that is known to be near."""

from __future__ import annotations

from collections.abc import Callable

# Of what is near: tried in this order, up to the first that is not held; then the gap is halved.
FRACTIONS, HALVINGS = (0.25, 0.5, 1.2), 5


def highest(holds: Callable[[float], bool], near: float) -> float:
    """Return the highest of the loads tried that was held, 0 if none was.

    At most 1.2 times `near` is tried; between a quarter of it and there the answer is within
    about a fiftieth of it.
    """
    held = 0.0
    for load in (fraction * near for fraction in FRACTIONS):
        if holds(load):
            held = load
            continue
        for _ in range(HALVINGS):
            middle = (held + load) / 2
            if holds(middle):
                held = middle
            else:
                load = middle
        return held
    return held
