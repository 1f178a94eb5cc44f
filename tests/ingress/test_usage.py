import asyncio
import logging
import math
from typing import Any

import pytest

from deployments.errors import NotReady
from deployments.ingress.usage import Tally, report
from deployments.snapshot import Usage

A = "aaaaaaaa"


def test_what_is_taken_is_what_the_catalog_reads() -> None:
    fields = Tally()
    fields.answered("mood", A, 3, 1)
    (counted,) = fields.take()
    assert {name for name in Usage.model_fields} == set(counted.__slots__)
    assert fields.take() == []


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
