"""The soak tells what grew, and for a minute nothing does."""

from collections import Counter

import pytest

from benchmarks.soak import MOST_GROWTH, Soaked, grew, main, memory
from benchmarks.use import Use

REST = Use(500.0, 60, 20, 15)


def soaked(mib: float = 0.0, files: int = 0, tasks: int = 0, ingress_mib: float = 0.0) -> Soaked:
    """Replicas that have so much more at the end."""
    more = REST._replace(files=REST.files + files, tasks=REST.tasks + tasks)
    samples = [
        {
            "Model 1": REST._replace(mib=REST.mib + mib * n / 99),
            "Ingress 2": REST._replace(mib=REST.mib + ingress_mib * n / 99),
        }
        for n in range(100)
    ]
    before = {"Model 1": REST, "Ingress 2": REST}
    return Soaked(Counter(), before, samples, before | {"Model 1": more})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (soaked(), []),
        (soaked(mib=10.0), []),  # of 1,000
        (soaked(mib=50.0), ["memory"]),
        (soaked(mib=-50.0), []),
        (soaked(mib=-50.0, ingress_mib=50.0), ["Ingress 2 memory"]),
        (soaked(files=3, tasks=3), []),
        (soaked(files=50), ["Model 1 files"]),
        (soaked(files=50, tasks=50), ["Model 1 files", "Model 1 tasks"]),
    ],
)
def test_what_grew_is_named(found: Soaked, expected: list[str]) -> None:
    assert grew(found, MOST_GROWTH) == expected


def test_a_replica_that_was_replaced_is_told() -> None:
    found = soaked()
    (told,) = grew(found._replace(after={"Model 3": REST, "Ingress 2": REST}), MOST_GROWTH)
    assert told.startswith("other replicas")
    assert "Model 3" in told


def test_memory_is_told_by_parts_of_the_time() -> None:
    samples = [{"Model 1": REST._replace(mib=float(n))} for n in range(10)]
    assert memory(samples, "Model 1") == [0.5, 2.5, 4.5, 6.5, 8.5]


def test_nothing_grows_for_a_minute() -> None:
    # More than a minute's median moves by where nothing grows; ten minutes have the real bound.
    assert main(minutes=1.0, most_growth=0.06) == 0
