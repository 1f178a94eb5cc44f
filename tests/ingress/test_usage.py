import asyncio
import logging
import math
from dataclasses import asdict
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.errors import NotReady
from deployments.ingress.usage import Tally, report
from deployments.usage import USAGES, Usage

A = "aaaaaaaa"


def test_what_is_taken_is_what_the_catalog_reads() -> None:
    tally = Tally()
    tally.answered("mood", A, 3, 1)
    tally.shadowed("mood", A, 4, 2, 0.5)
    (counted,) = tally.take()
    assert USAGES.validate_python([asdict(counted)]) == [counted]
    assert counted == Usage("mood", A, 3, 1, counted.last_used_s, 4, 2, 0.5)
    assert tally.take() == []


@pytest.mark.parametrize(
    "wrong", [{"num_rows": "many"}, {"score_shift": math.nan}, {"version": "x"}, {"more": 1}]
)
def test_what_is_no_usage_is_not_summed(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        USAGES.validate_python([{"task": "mood", "version": A, **wrong}])


def test_counts_that_are_no_numbers_are_taken_all_the_same() -> None:
    tally = Tally()
    tally.shadowed("mood", A, 1, 0, math.nan)
    assert [one.num_shadowed for one in tally.take()] == [1]


@pytest.mark.parametrize("error", [NotReady("away"), ValueError("broken"), KeyError("x")])
async def test_reports_go_on_whatever_goes_wrong_and_nothing_is_lost(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    tally, told, fails = Tally(), list[dict[str, Any]](), [True] * 3

    async def tell(counted: list[dict[str, Any]]) -> None:
        if fails:
            fails.pop()
            tally.answered("mood", A, 2, 1)  # meanwhile
            raise error
        told.extend(counted)

    tally.answered("mood", A, 4, 1)
    with caplog.at_level(logging.WARNING, "ray.serve"):
        reporting = asyncio.create_task(report(tally, tell, 0.001))
        async with asyncio.timeout(5):
            while not told:
                await asyncio.sleep(0.001)
        assert not reporting.done()
        reporting.cancel()
    (one,) = told
    assert (one["num_rows"], one["num_errors"]) == (10, 4)
    assert len(caplog.records) == (0 if isinstance(error, NotReady) else 1)
