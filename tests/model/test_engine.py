from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adapters.directory import Directory
from deployments.model.encoder import default_dtype
from deployments.model.engine import BadRow, Engine
from deployments.rows import Prediction, Row, Tokens

GOOD = Row(2, Tokens([5, 6, 7]))


@pytest.fixture(scope="module")
def engine(
    tiny_base: str, make_adapter: Callable[..., PeftModel], tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    """Slot 2 holds an adapter, slots 1 and 3 hold none."""
    engine = Engine(tiny_base, quantization="int8", device="cpu")
    store = Directory(tmp_path_factory.mktemp("store"))
    make_adapter(store.root / "task", tiny_base, 3)
    engine.write(2, engine.read(store.read("task")))
    return engine


BAD_ROWS = [
    (Row(0, Tokens([5])), "slot 0 holds no adapter"),
    (Row(1, Tokens([5])), "slot 1 holds no adapter"),
    (Row(-2, Tokens([5])), "slot -2 holds no adapter"),
    (Row(4, Tokens([5])), "slot 4 holds no adapter"),
    (Row(2, Tokens([])), "the input has no tokens"),
    (Row(2, Tokens([5] * 41)), "41 tokens exceed the base's 40 positions"),
    (Row(2, Tokens([5, 64])), "outside the base's vocabulary of 64"),
    (Row(2, Tokens([-1, 5])), "outside the base's vocabulary of 64"),
    (Row(2, Tokens([5, 6], [0])), "1 type ids for 2 token ids"),
]


@pytest.mark.parametrize(("row", "problem"), BAD_ROWS)
def test_a_row_that_cannot_be_read_fails_alone(engine: Engine, row: Row, problem: str) -> None:
    (alone,) = engine.predict([GOOD])
    before, bad, after = engine.predict([GOOD, row, GOOD])
    assert isinstance(bad, BadRow)
    assert problem in str(bad)
    for answer in (before, after):
        assert isinstance(answer, Prediction)
        assert isinstance(alone, Prediction)
        assert answer.logits == pytest.approx(alone.logits, abs=1e-5)


def test_a_batch_of_bad_rows_alone_is_answered_too(engine: Engine) -> None:
    answers = engine.predict([row for row, _ in BAD_ROWS])
    assert all(isinstance(answer, BadRow) for answer in answers)
    assert len(answers) == len(BAD_ROWS)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_gradients_flow_from_the_logits_to_the_embeddings(
    quantization: str,
    tiny_base: str,
    make_adapter: Callable[..., PeftModel],
    tmp_path: Path,
) -> None:
    engine = Engine(tiny_base, quantization=quantization, device="cpu")
    make_adapter(tmp_path / "task", tiny_base, 3)
    engine.write(1, engine.read(Directory(tmp_path).read("task")))
    row = Row(1, Tokens([5, 6, 7]))
    engine.predict([row])  # inference before it must leave nothing that stops them
    words = engine.encoder.model.get_input_embeddings()
    seen: list[torch.Tensor] = []
    hook = words.register_forward_hook(lambda *given: seen.append(given[2].requires_grad_()))
    engine.logits([row])[0, 0].backward()
    hook.remove()
    (embedded,) = seen
    assert embedded.grad is not None
    assert embedded.grad.isfinite().all()
    assert (embedded.grad.abs().amax(dim=-1) > 1e-4).all(), "a token without a gradient"


def test_a_device_that_is_not_known_is_named(tiny_base: str) -> None:
    with pytest.raises(ValueError, match="device='tpu' is not one of auto, cpu, cuda"):
        Engine(tiny_base, device="tpu")


def test_a_gpu_that_is_not_there_is_said(tiny_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda, but torch sees no GPU here"):
        Engine(tiny_base, device="cuda")


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_a_gpu_computes_in_what_its_hardware_has(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert default_dtype(torch.device("cuda")) == dtype
    assert default_dtype(torch.device("cpu")) == torch.float32
