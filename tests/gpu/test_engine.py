"""The engine on a CUDA device. Where there is none these skip, and nothing is claimed of them."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BertModel, LlamaModel

from adapters.directory import Directory
from deployments.model import graphs
from deployments.model.dynamic_batch import dynamic_batch
from deployments.model.encoder import default_dtype
from deployments.model.engine import Engine
from deployments.model.planner import Planner
from deployments.model.quantize import quantize
from deployments.model.unpadded import unpad
from deployments.rows import Prediction, Row, Tokens

NUM_SLOTS = 5
CUDA = torch.device("cuda")


def rows_of(lengths: list[int], shift: int = 0) -> list[Row]:
    """Rows of all slots in turn."""
    dice = torch.Generator().manual_seed(sum(lengths))
    return [
        Row(
            1 + (index + shift) % NUM_SLOTS,
            Tokens(torch.randint(5, 500, (length,), generator=dice).tolist()),
        )
        for index, length in enumerate(lengths)
    ]


def logits(engine: Engine, rows: list[Row]) -> torch.Tensor:
    with torch.inference_mode():
        return engine.logits(rows).cpu()


def eagerly(engine: Engine, rows: list[Row]) -> torch.Tensor:
    record, engine.encoder._captured.record = engine.encoder._captured.record, None
    answers = logits(engine, rows)
    engine.encoder._captured.record = record
    return answers


def peft_logits(
    folder: Path, quantization: str, rows: list[Row], dtype: torch.dtype
) -> list[torch.Tensor]:
    """PEFT's logits of each row alone, its base quantised as ours is."""
    found = []
    for row in rows:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder / "base", num_labels=1 + row.slot, dtype=dtype
        )
        quantize(model, {"classifier"}, quantization, CUDA)
        task = folder / "store" / f"task{row.slot}"
        model = PeftModel.from_pretrained(model.to(CUDA), str(task)).eval()
        with torch.inference_mode():
            given = torch.tensor([row.tokens.ids], device=CUDA)
            found.append(model(input_ids=given).logits[0].float().cpu())
    return found


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_it_answers_as_peft_does(
    quantization: str, folder: Path, make_engine: Callable[[str], Engine]
) -> None:
    rows = rows_of([3, 40, 17, 8, 29, 60, 33, 21])
    engine = make_engine(quantization)
    dtype = default_dtype(CUDA)
    ours = eagerly(engine, rows)
    exact = peft_logits(folder, "none", rows, torch.float32)
    theirs = peft_logits(folder, quantization, rows, dtype)
    our_error = torch.cat(
        [(got[: len(want)] - want).abs() for got, want in zip(ours, exact, strict=True)]
    )
    their_error = torch.cat([(got - want).abs() for got, want in zip(theirs, exact, strict=True)])
    assert their_error.mean() > 0
    assert our_error.mean() <= 1.5 * their_error.mean()
    assert our_error.max() <= 2.5 * their_error.max()


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_a_graph_answers_as_the_encoder_does(
    quantization: str, make_engine: Callable[[str], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_AFTER", 1)
    engine = make_engine(quantization)
    captured = engine.encoder._captured
    for lengths in ([5], [9, 30, 17], [33] * 9, [120, 7, 64, 31, 2]):
        for shift in (0, 1, 2):
            rows = rows_of(lengths, shift)
            got, want = logits(engine, rows), eagerly(engine, rows)
            scale = want.abs().max()
            assert (got - want).abs().max() <= 0.03 * scale
    assert captured.record is not None, "it could not be recorded"
    assert len(captured._graphs) == 4


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="FlashAttention needs compute capability 8",
)
@pytest.mark.parametrize("cls", [BertModel, LlamaModel])
def test_attention_without_padding_is_taken_and_answers_as_sdpa_does(
    cls: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = cls.config_class(**sizes, vocab_size=512, num_key_value_heads=2, pad_token_id=0)
    torch.manual_seed(0)
    exact = cls(config).to(CUDA).eval()
    exact.save_pretrained(tmp_path)
    plain, ours = (
        cls.from_pretrained(tmp_path, dtype=torch.bfloat16).to(CUDA).eval() for _ in range(2)
    )
    with caplog.at_level("WARNING", "ray.serve"):
        unpad(ours, CUDA, torch.bfloat16)
    assert not caplog.records, "torch's own kernel is not trusted on this device"
    for model in (exact, plain, ours):
        model.config.use_cache = False
    for lengths in ([5, 1, 9], [120, 7, 64, 31, 2], [300, 299, 8], [1]):
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        ids, mask = torch.randint(5, 500, real.shape).to(CUDA), real.long().to(CUDA)
        with torch.inference_mode():
            want, theirs, got = (
                model(input_ids=ids, attention_mask=mask).last_hidden_state[real.to(CUDA)].float()
                for model in (exact, plain, ours)
            )
        assert (got - want).abs().mean() <= 1.5 * (theirs - want).abs().mean()


def test_a_slot_is_written_while_a_forward_runs(
    folder: Path, make_engine: Callable[[str], Engine]
) -> None:
    engine = make_engine("none")
    long, short = rows_of([120] * 200), rows_of([9])
    store = Directory(folder / "store")
    other = engine.read(store.read("task2"))
    assert other.packed.pages.is_pinned()
    want, before = eagerly(engine, long), eagerly(engine, short)
    for _ in range(20):
        with torch.inference_mode():
            running = engine.logits(long)  # is not waited for
            engine.write(1, other)
            after = engine.logits(short)
        assert torch.equal(running.cpu(), want)
        with torch.inference_mode():
            alike = engine.logits([Row(2, short[0].tokens)])
        assert torch.allclose(after.cpu(), alike.cpu(), atol=1e-2)
        assert after.shape != before.shape  # task 2 has one label more
        engine.write(1, engine.read(store.read("task1")))
    assert torch.equal(eagerly(engine, short), before)


async def test_out_of_memory_halves_the_batch_and_every_row_is_answered(
    make_engine: Callable[[str], Engine],
) -> None:
    engine = make_engine("none")
    engine.encoder._captured.record = None
    tried: list[int] = []

    class Replica:
        planner = Planner(max_rows=4096, max_tokens=2**20)

        @dynamic_batch
        async def answer(self, rows: list[Row]) -> list[Prediction | Exception]:
            tried.append(len(rows))
            return await asyncio.to_thread(engine.predict, rows)

    rows = rows_of([120] * 2048)
    engine.predict(rows[:8])
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    allowed = torch.cuda.memory_allocated(CUDA) + 128 * 2**20
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        replica = Replica()
        answers = await asyncio.gather(*(replica.answer(row) for row in rows))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(tried) > 1, "all of them fitted"
    assert tried[0] == 2048
    for row, answer in zip(rows, answers, strict=True):
        assert isinstance(answer, Prediction)
        assert len(answer.scores) == 1 + row.slot
