import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adapters.directory import Directory
from deployments.config import Args
from deployments.model.budget import Budget, limits
from deployments.model.deployment import Model
from deployments.model.dynamic_batch import dynamic_batch
from deployments.model.engine import BadRow
from deployments.model.planner import Planner
from deployments.rows import Prediction, Row, Tokens


def simulated(budget: Budget, lengths: list[int], fixed_s: float, token_s: float) -> list[float]:
    """Empty a queue; return the seconds of each forward on a base of these costs."""
    waiting, taken = list(lengths), []
    while waiting:
        picked = budget.pick(waiting)
        batch = [waiting[index] for index in picked]
        waiting = [length for index, length in enumerate(waiting) if index not in picked]
        taken.append(fixed_s + token_s * len(batch) * max(batch))
        budget.note(batch, taken[-1])
    return taken


def test_a_slow_base_shrinks_the_budget_after_its_first_forward() -> None:
    budget = Budget(Planner(64, 1024))
    taken = simulated(budget, [32] * 200, fixed_s=0.05, token_s=0.02)
    assert taken[0] == pytest.approx(0.05 + 0.02 * 64)
    assert max(taken[1:]) <= 1.0
    assert budget.max_tokens in range(40, 50)


def test_a_fast_base_has_all_tokens_from_the_second_forward_on() -> None:
    budget = Budget(Planner(64, 1024))
    simulated(budget, [32] * 3, fixed_s=0.005, token_s=5e-5)
    assert budget.most_tokens == 1024
    assert budget.max_tokens == 1024


def test_a_base_whose_cost_is_fixed_is_found_out_though_small_forwards_hide_it() -> None:
    """A decoder reads its weights at each forward: 0.4 s for one token, and for a hundred 0.6 s."""
    budget = Budget(Planner(64, 1024))
    budget.note([8], 0.416)
    assert budget.max_tokens == 19
    taken = simulated(budget, [8] * 400, fixed_s=0.4, token_s=0.002)
    assert max(taken) <= 1.0
    assert budget.max_tokens > 200


def test_one_forward_that_was_held_up_changes_nothing_but_two_do() -> None:
    budget = Budget(Planner(64, 1024))
    for _ in range(5):
        budget.note([32] * 32, 0.2)
    budget.note([32] * 32, 60.0)
    assert budget.max_tokens == 1024
    budget.note([32] * 32, 60.0)
    assert budget.max_tokens == 17
    budget.note([17], 0.01)
    assert budget.max_tokens == 1024


def test_a_forward_that_did_not_run_says_nothing() -> None:
    budget = Budget(Planner(64, 1024))
    budget.note([32] * 32, 10.0)
    before = budget.max_tokens
    budget.note([], 1e-9)
    assert budget.max_tokens == before == 102


@given(
    st.lists(st.tuples(st.lists(st.integers(1, 600), max_size=8), st.floats(0, 1e4)), max_size=8),
    st.lists(st.integers(1, 600), min_size=1, max_size=80),
)
def test_the_oldest_row_goes_and_caps_hold_whatever_forwards_took(
    forwards: list[tuple[list[int], float]], lengths: list[int]
) -> None:
    budget = Budget(Planner(16, 2000))
    for batch, seconds in forwards:
        budget.note(batch, seconds)
    picked = budget.pick(lengths)
    assert picked[0] == 0
    assert len(picked) <= 16
    if len(picked) > 1:
        assert len(picked) * max(lengths[index] for index in picked) <= budget.max_tokens <= 2000


class Slow:
    """Rows through a real forward: linears on one thread, a fraction of a millisecond a token."""

    def __init__(self, planner: Any) -> None:
        self.planner = planner
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(24)))
        self.forwards: list[tuple[int, float]] = []

    @dynamic_batch
    async def answer(self, rows: list[Row]) -> list[Any]:
        started_s = time.perf_counter()
        with torch.inference_mode():
            self.model(torch.zeros(len(rows), max(row.num_tokens for row in rows), 1024))
        seconds = time.perf_counter() - started_s
        self.forwards.append((len(rows), seconds))
        self.planner.note([row.num_tokens for row in rows], seconds)
        return list(rows)


async def test_real_forwards_stay_near_their_limit() -> None:
    row = Row(1, Tokens([1] * 64))
    unbounded = Slow(Budget(Planner(64, 4096), max_forward_s=1e9))
    await asyncio.gather(*(unbounded.answer(row) for _ in range(1 + 3 * 64)))
    whole_s = sorted(seconds for rows, seconds in unbounded.forwards if rows == 64)[1]
    bounded = Slow(Budget(Planner(64, 4096), max_forward_s=whole_s / 8))
    await asyncio.gather(*(bounded.answer(row) for _ in range(1 + 3 * 64)))
    rows, times = zip(*bounded.forwards, strict=True)
    assert sum(rows) == 1 + 3 * 64
    assert sorted(times)[len(times) // 2] < whole_s / 4  # others use these cores too
    assert max(rows) < 32
    assert max(rows) > 2


async def test_the_deployment_notes_the_rows_that_ran() -> None:
    noted: list[Any] = []

    class Noting(Budget):
        def note(self, lengths: Any, seconds: float) -> None:
            noted.append((list(lengths), seconds))

    class Engine:
        def predict(self, rows: list[Row]) -> list[Any]:
            time.sleep(0.02)
            return [
                BadRow("x") if row.num_tokens == 9 else Prediction([0.0], [1.0]) for row in rows
            ]

    async def run(work: Any, *args: Any) -> Any:
        await asyncio.sleep(0.2)  # waiting for the device is no forward
        return work(*args)

    model = Model.__new__(Model)
    model.planner = Noting(Planner(8, 1000))
    model.engine = Engine()
    model._on_device = run
    rows = [Row(1, Tokens([1] * length)) for length in (4, 9, 5)]
    await asyncio.gather(*(model.answer(row) for row in rows), return_exceptions=True)
    ((lengths, seconds),) = noted
    assert lengths == [4, 5]
    assert 0.02 <= seconds < 0.15


@pytest.mark.parametrize(
    ("device", "given", "most"),
    [("cpu", "auto", 1024), ("cuda", "auto", 16384), ("cpu", 300, 300), ("cuda", 9, 9)],
)
def test_a_device_has_its_own_budget(device: str, given: Any, most: int, tmp_path: Any) -> None:
    args = Args(base_model="org/name", adapter_store=str(tmp_path), max_batch_tokens=given)
    planner = Budget(limits(args, on_cpu=device == "cpu", padded=True))
    planner.note([most], 1e-6)
    assert planner.max_tokens == most


def test_where_layers_see_no_padding_none_is_counted(tmp_path: Any) -> None:
    args = Args(base_model="org/name", adapter_store=str(tmp_path))
    planner = Budget(limits(args, on_cpu=True, padded=False))
    assert not planner.padded
    planner.note([100, 10, 10], 0.5)  # 120 tokens; padded they were 300
    assert planner.max_tokens == planner.last_tokens_per_s == 240
    planner.note([1024], 1e-6)
    planner.note_too_large([500, 50, 50])
    assert planner.max_tokens == 300


async def test_a_replica_plans_by_what_its_layers_see(
    example_store: Directory, start_model: Callable[..., Awaitable[Model]]
) -> None:
    model = await start_model(example_store)
    assert model.engine.encoder.is_ragged
    assert not model.planner.padded


def test_forwards_are_short_while_a_task_with_a_latency_target_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    budget = Budget(Planner(64, 4096))
    taken = simulated(budget, [32] * 400, fixed_s=0.002, token_s=1e-4)
    assert max(taken) > 0.15
    budget.promise("urgent", 0.1)
    budget.promise("calm", 5.0)
    taken = simulated(budget, [32] * 400, fixed_s=0.002, token_s=1e-4)
    assert 0.02 < max(taken[2:]) <= 0.04  # one to wait for, one of its own
    now_s += 31
    taken = simulated(budget, [32] * 400, fixed_s=0.002, token_s=1e-4)
    assert max(taken) > 0.15


def test_a_target_that_cannot_be_kept_does_not_make_forwards_ever_shorter() -> None:
    budget = Budget(Planner(64, 4096))
    simulated(budget, [32] * 400, fixed_s=0.05, token_s=1e-4)
    budget.promise("urgent", 0.01)
    simulated(budget, [32] * 800, fixed_s=0.05, token_s=1e-4)
    assert budget.max_tokens > 200


def test_other_limits_hold_from_the_next_batch_on() -> None:
    budget = Budget(Planner(8, 1000))
    budget.note([100] * 8, 0.001)
    assert len(budget.pick([10] * 20)) == 8
    budget.limit(Planner(3, 1000))
    assert len(budget.pick([10] * 20)) == 3
    budget.limit(Planner(20, 50))
    assert len(budget.pick([10] * 20)) == 5
    assert budget.tokens_per_s > 0
