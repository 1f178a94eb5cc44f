"""A forward that does not fit on a GPU is halved; no CPU runs out of memory in this way."""

import asyncio
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from adapters.directory import Directory
from deployments.model.dynamic_batch import dynamic_batch
from deployments.model.encoder import Encoder
from deployments.model.engine import Engine
from deployments.model.fitting import DoesNotFit
from deployments.model.planner import Planner
from deployments.rows import Prediction, Row, Tokens


class Small:
    """A replica whose device holds so many tokens of a batch."""

    planner = Planner(max_rows=64, max_tokens=4096)

    def __init__(self, engine: Engine, max_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = engine
        self.sizes: list[tuple[int, int]] = []
        self.held: list[weakref.ref[torch.Tensor]] = []
        real = Encoder.forward

        def forward(encoder: Encoder, ids: torch.Tensor, *rest: Any) -> object:
            self.sizes.append(tuple(ids.shape))
            if ids.numel() > max_tokens:
                assert not [1 for ref in self.held if ref() is not None], "an earlier try is kept"
                activations = torch.zeros(3)
                self.held.append(weakref.ref(activations))
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(encoder, ids, *rest)

        monkeypatch.setattr(Encoder, "forward", forward)

    @dynamic_batch
    async def answer(self, rows: list[Row]) -> list[Prediction | Exception]:
        return await asyncio.to_thread(self.engine.predict, rows)


@pytest.fixture
def engine(tiny_base: str, make_adapter: Callable[..., PeftModel], tmp_path: Path) -> Engine:
    engine = Engine(tiny_base, quantization="none", device="cpu")
    make_adapter(tmp_path / "task", tiny_base, 3)
    engine.write(1, engine.read(Directory(tmp_path).read("task")))
    return engine


async def test_what_does_not_fit_is_halved_and_every_row_is_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row(1, Tokens([5 + index, 6, 7, 8])) for index in range(16)]
    want = engine.predict(rows)
    small = Small(engine, 5 * 4, monkeypatch)
    got = await asyncio.gather(*(small.answer(row) for row in rows))
    assert sorted(small.sizes, reverse=True) == [(16, 4)] + [(8, 4)] * 2 + [(4, 4)] * 4
    for one, other in zip(got, want, strict=True):
        assert isinstance(other, Prediction)
        assert one.scores == pytest.approx(other.scores, abs=1e-6)
    assert all(ref() is None for ref in small.held)


async def test_a_row_that_does_not_fit_alone_fails_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Small(engine, 5 * 4, monkeypatch)
    rows = [Row(1, Tokens([5] * length)) for length in (4, 4, 30, 4)]
    got = await asyncio.gather(*(small.answer(row) for row in rows), return_exceptions=True)
    assert [type(one) for one in got] == [
        Prediction, Prediction, DoesNotFit, Prediction,
    ]  # fmt: skip


def test_memory_that_was_reserved_is_given_back(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Small(engine, 1, monkeypatch)
    alive_at_release = []
    monkeypatch.setattr(
        torch.cuda,
        "empty_cache",
        lambda: alive_at_release.append([ref() is not None for ref in small.held]),
    )
    with pytest.raises(DoesNotFit):
        engine.predict([Row(1, Tokens([5, 6]))])
    assert alive_at_release == [[False]], "what is alive is not given back"


def test_out_of_memory_is_not_a_lost_device() -> None:
    assert not issubclass(torch.OutOfMemoryError, torch.AcceleratorError)
