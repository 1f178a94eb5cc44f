"""What a replica has run, and holds, before it takes traffic."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.directory import Directory
from deployments.model.budget import Budget
from deployments.model.deployment import Model
from deployments.model.engine import Engine
from deployments.model.fitting import DoesNotFit
from deployments.model.planner import Planner
from deployments.model.warmup import bring, warm_up
from deployments.rows import Row

Start = Callable[..., Awaitable[Model]]


@pytest.fixture
async def model(start_model: Start, tmp_path: Path) -> Model:
    return await start_model(Directory(tmp_path), adapter_slots=2)


def test_a_base_without_adapters_runs_its_shapes(tiny_base: str) -> None:
    engine = Engine(tiny_base, quantization="none", device="cpu")
    planner = Budget(Planner(8, 256))
    assert planner.tokens_per_s == 0
    warm_up(engine, planner, [], 20)
    assert planner.tokens_per_s > 0
    assert planner.answered_tokens_per_s() > 0


async def test_rows_of_all_residents_run_and_no_longer_than_the_base_takes(
    model: Model, publish_to: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = partial(publish_to, Directory(tmp_path))
    names = [f"{task}@{publish(task)}" for task in ("one", "two")]
    await bring(model.residents, names, 20)
    ran: list[list[Row]] = []
    real = model.engine.predict
    monkeypatch.setattr(model.engine, "predict", lambda rows: ran.append(rows) or real(rows))
    slots = [*model.residents.slots.resident.values()]
    await model._on_device(warm_up, model.engine, Budget(Planner(8, 256)), slots, 40)
    assert {row.num_tokens for rows in ran for row in rows} == {8, 16, 32}
    assert {row.slot for rows in ran for row in rows} == {*slots}
    assert {1, 8} <= {len(rows) for rows in ran}


async def test_the_most_wanted_of_the_peers_come_as_far_as_there_are_slots(
    model: Model, publish_to: Callable[..., str], tmp_path: Path
) -> None:
    publish = partial(publish_to, Directory(tmp_path))
    names = [f"{task}@{publish(task)}" for task in ("one", "two", "three")]
    await bring(model.residents, names, 20)
    assert {*model.residents.hot(9)} == {*names[:2]}  # they were loaded at the same time
    await model.warm(*names[1].split("@"))
    assert model.residents.hot(1) == [names[1]]


async def test_what_cannot_be_had_is_left_for_its_first_request(
    model: Model, publish_to: Callable[..., str], tmp_path: Path
) -> None:
    good = f"one@{publish_to(Directory(tmp_path), 'one')}"
    await bring(model.residents, [good, "nobody@00000000"], 20)
    assert model.residents.hot(9) == [good]


async def test_a_store_that_hangs_does_not_keep_a_replica_from_its_start(
    model: Model,
    publish_to: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = f"one@{publish_to(Directory(tmp_path), 'one')}"
    real = model.residents.warm

    async def warm(task: str, *versions: str) -> None:
        if task == "slow":
            await asyncio.Event().wait()
        if task == "broken":
            raise RuntimeError("a bug")
        await real(task, *versions)

    monkeypatch.setattr(model.residents, "warm", warm)
    monkeypatch.setattr(model.residents.slots, "_max_slots", 3)
    async with asyncio.timeout(10):
        await bring(model.residents, [good, "slow@00000000", "broken@00000000"], 1.0)
    assert model.residents.hot(9) == [good]


@pytest.mark.parametrize("with_residents", [False, True])
async def test_what_does_not_fit_is_learned_and_what_fits_runs(
    model: Model,
    publish_to: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    with_residents: bool,
) -> None:
    if with_residents:
        await bring(model.residents, [f"one@{publish_to(Directory(tmp_path), 'one')}"], 20)
    slots = [*model.residents.slots.resident.values()]
    base, ran = model.engine.encoder.model.base_model, []
    real = base.forward

    def forward(input_ids: torch.Tensor, **given: Any) -> Any:
        if input_ids.numel() > most:
            raise MemoryError
        ran.append(input_ids.numel())
        return real(input_ids, **given)

    monkeypatch.setattr(base, "forward", forward)
    planner, most = Budget(Planner(8, 256), 1e6), 20
    await model._on_device(warm_up, model.engine, planner, slots, 40)
    assert {8, 16} <= {*ran}
    assert planner.max_tokens <= 64
    most = 4
    with pytest.raises(DoesNotFit):
        await model._on_device(warm_up, model.engine, planner, slots, 40)
