"""A replica that cannot answer says so, and its callers are told; a row may fail alone."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from peft import PeftModel

from adapters.directory import Directory
from deployments.errors import BatchLoopDied, TooLate
from deployments.model.answers import as_data
from deployments.model.budget import Budget
from deployments.model.deployment import Model
from deployments.model.dynamic_batch import batch_queue
from deployments.model.encoder import Encoder
from deployments.model.engine import Engine
from deployments.model.fitting import DoesNotFit
from deployments.model.health import Health
from deployments.model.planner import Planner
from deployments.model.scores import NoNumber
from deployments.rows import Prediction, Row, Tokens

GOOD, OTHER = Row(1, Tokens([5, 6, 7])), Row(2, Tokens([5, 6, 7]))


@pytest_asyncio.fixture
async def model(
    tiny_base: str, make_adapter: Callable[..., PeftModel], tmp_path: Path
) -> AsyncIterator[Model]:
    """A replica's model with its real engine and thread, and two adapters; no store, no Serve."""
    model = Model.__new__(Model)
    model.engine = Engine(tiny_base, quantization="none", device="cpu")
    model.planner = Budget(Planner(8, 1000))
    model.health = Health(hung_s=0.2)
    model._device = ThreadPoolExecutor(1)
    for slot in (1, 2):
        make_adapter(tmp_path / f"task{slot}", tiny_base, 3)
        model.engine.write(slot, model.engine.read(Directory(tmp_path).read(f"task{slot}")))
    yield model
    queue = batch_queue(model.answer)
    if queue is not None:
        queue.close()


async def test_a_row_that_takes_long_by_its_tokens_does_not_hang(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()
    monkeypatch.setattr(model.engine, "predict", lambda rows: [let_go.wait(30)] * len(rows))
    model.planner.note([3], 3.0)  # a token a second: three of them take three
    call = asyncio.ensure_future(model.answer(GOOD))
    await asyncio.sleep(0.4)
    await model.check_health()
    let_go.set()
    assert await call


async def test_a_forward_that_hangs_fails_the_check_and_all_rows(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()
    ended: list[bool] = []
    model.health = Health(hung_s=0.2, end=lambda: ended.append(True))
    monkeypatch.setattr(model.engine, "predict", lambda rows: [let_go.wait(30)] * len(rows))
    calls = [asyncio.ensure_future(model.answer(GOOD))]
    await asyncio.sleep(0.05)
    calls.append(asyncio.ensure_future(model.answer(GOOD)))
    await model.check_health()  # it has not been long
    await asyncio.sleep(0.3)
    started_s = time.monotonic()
    with pytest.raises(RuntimeError, match="forward has not ended"):
        await model.check_health()
    assert time.monotonic() - started_s < 0.1
    for failed in await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 2):
        assert isinstance(failed, BatchLoopDied)
    with pytest.raises(BatchLoopDied):
        await model.answer(GOOD)
    with pytest.raises(RuntimeError, match="forward has not ended"):
        await model.check_health()
    assert not ended, "before its callers are told"
    await asyncio.sleep(1.1)
    assert ended == [True]
    let_go.set()


async def test_a_forward_that_hangs_after_a_quiet_night_is_noticed_as_soon(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    await model.answer(GOOD)
    model.planner._best_at_s -= 8 * 3600
    assert model.planner.tokens_per_s < 1e-9
    let_go = threading.Event()
    monkeypatch.setattr(model.engine, "predict", lambda rows: [let_go.wait(30)] * len(rows))
    call = asyncio.ensure_future(model.answer(GOOD))
    await asyncio.sleep(0.5)
    with pytest.raises(RuntimeError, match="forward has not ended"):
        await model.check_health()
    let_go.set()
    with pytest.raises(BatchLoopDied):
        await call


async def test_an_idle_replica_and_many_short_forwards_are_healthy(model: Model) -> None:
    await model.check_health()
    until_s = time.monotonic() + 0.5
    while time.monotonic() < until_s:
        await model.answer(GOOD)
        await model.check_health()
    await asyncio.sleep(0.3)
    await model.check_health()


async def test_a_broken_adapter_fails_its_rows_alone_and_the_replica_stays(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 2)
    good, bad = await asyncio.gather(
        model.answer(GOOD), model.answer(OTHER), return_exceptions=True
    )
    assert isinstance(good, Prediction)
    assert isinstance(bad, NoNumber)
    assert "NaN or infinity" in str(as_data(bad))
    await model.check_health()


async def test_a_base_that_gives_no_numbers_fails_the_check(model: Model) -> None:
    await model._check_base()
    await model.check_health()
    with torch.no_grad():
        next(iter(model.engine.encoder.model.base_model.parameters())).fill_(float("nan"))
    calls = [asyncio.ensure_future(model.answer(GOOD)) for _ in range(20)]
    for told in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(told, BatchLoopDied), "so that they are asked elsewhere"
    with pytest.raises(RuntimeError, match="base gives no numbers"):
        await model.check_health()


def spoil(monkeypatch: pytest.MonkeyPatch, slot: int) -> None:
    """Have the adapter of a slot give NaN."""
    real = Encoder.forward

    def forward(encoder: Encoder, ids: Any, mask: Any, types: Any, slots: Any, *rest: Any) -> Any:
        logits = real(encoder, ids, mask, types, slots, *rest)
        assert logits.sequences is not None
        for row, of in enumerate(slots):
            if of == slot:
                logits.sequences[row, 0] = float("nan")
        return logits

    monkeypatch.setattr(Encoder, "forward", forward)


async def test_memory_that_torch_or_python_lack_halves_the_batch_and_the_budget(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        await model.answer(GOOD)
    assert model.planner.max_tokens > 24
    real, sizes = Encoder.forward, []

    def forward(encoder: Encoder, ids: torch.Tensor, *rest: Any) -> object:
        sizes.append(ids.numel())
        if ids.numel() > 12:
            torch.empty(2**60)  # as a CPU has it
        if ids.numel() > 6:
            raise MemoryError
        return real(encoder, ids, *rest)

    monkeypatch.setattr(Encoder, "forward", forward)
    answers = await asyncio.gather(*(model.answer(GOOD) for _ in range(8)))
    assert all(isinstance(answer, Prediction) for answer in answers)
    assert sizes == [24, 12, 6, 6, 12, 6, 6]
    assert model.planner.max_tokens == 6
    alone = Row(1, Tokens([5] * 20))
    with pytest.raises(DoesNotFit) as failed:
        await model.answer(alone)
    assert "takes more memory" in str(as_data(failed.value))
    monkeypatch.setattr(Encoder, "forward", real)
    before = model.planner.max_tokens
    for _ in range(60):
        await asyncio.gather(*(model.answer(GOOD) for _ in range(8)))
    assert before < model.planner.max_tokens < 100  # it comes back, and not at once


async def test_a_row_whose_deadline_has_passed_is_not_run(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Row] = []
    real = model.engine.predict

    def predict(rows: list[Row]) -> Any:
        ran.extend(rows)
        time.sleep(0.1)
        return real(rows)

    monkeypatch.setattr(model.engine, "predict", predict)
    first = asyncio.ensure_future(model.answer(GOOD))
    await asyncio.sleep(0.02)
    late = Row(1, GOOD.tokens, deadline_s=time.monotonic() + 0.02)
    soon = Row(1, GOOD.tokens, deadline_s=time.monotonic() + 30)
    told, answered = await asyncio.gather(
        model.answer(late), model.answer(soon), return_exceptions=True
    )
    assert isinstance(told, TooLate)
    assert "deadline" in str(as_data(told))
    assert isinstance(answered, Prediction)
    assert isinstance(await first, Prediction)
    assert ran == [GOOD, soon]


async def test_what_is_told_for_autoscaling_counts_what_has_no_answer(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await model.record_autoscaling_stats())["queued_tokens"] == 0
    real = model.engine.predict
    monkeypatch.setattr(model.engine, "predict", lambda rows: (time.sleep(0.1), real(rows))[1])
    calls = [asyncio.ensure_future(model.answer(GOOD)) for _ in range(5)]
    await asyncio.sleep(0.05)
    assert (await model.record_autoscaling_stats())["queued_tokens"] == 15
    await asyncio.gather(*calls)
    told = await model.record_autoscaling_stats()
    assert told["queued_tokens"] == 0
    assert told["tokens_per_s"] > 0
    assert told["answered_tokens_per_s"] > 0
