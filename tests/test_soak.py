"""The soak tells what grew, and for a minute nothing does."""

from typing import Any

import pytest

from benchmarks.soak import MOST_GROWTH, Use, growth, main, too_much

AT_S = range(0, 100, 2)
STEADY = Use(500.0, 60, 20, 15)


def samples(**grow: float) -> Any:
    """A replica that has more of something every second, beside one that has not."""
    return [
        (
            float(at_s),
            {
                "Model 1": Use(
                    **{k: v + grow.get(k, 0) * at_s for k, v in STEADY._asdict().items()}
                ),
                "Ingress 2": STEADY,
            },
        )
        for at_s in AT_S
    ]


@pytest.mark.parametrize(
    ("grow", "expected"),
    [
        ({}, []),
        ({"mib": 0.05}, []),  # of 1,000
        ({"mib": 0.5}, ["memory"]),
        ({"files": 0.5}, ["Model 1 files"]),
        ({"threads": 0.02, "tasks": 1.0}, ["Model 1 tasks"]),
    ],
)
def test_what_grew_is_named(grow: dict[str, float], expected: list[str]) -> None:
    grown = growth(samples(**grow), warm_s=20.0)
    assert too_much(grown) == expected
    assert (grown["memory_growth"] > MOST_GROWTH) == ("memory" in expected)


def test_what_came_before_the_warm_up_ended_does_not_count() -> None:
    early = [(at_s, {"Model 1": STEADY._replace(mib=1.0)}) for at_s in (0.0, 5.0, 10.0)]
    late = [(at_s, {"Model 1": STEADY}) for at_s in (20.0, 37.0, 53.0, 69.0, 85.0, 100.0)]
    assert growth(early + late, warm_s=20.0)["memory_growth"] == 0.0


@pytest.mark.slow
def test_nothing_grows_for_a_minute() -> None:
    assert main(minutes=1.0) == 0
