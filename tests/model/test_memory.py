import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deployments.config import GIB, ConfigError
from deployments.model import memory
from deployments.model.bank import Bank
from deployments.model.engine import Engine
from deployments.model.graphs import MAX_TOKENS
from deployments.model.memory import (
    Memory,
    available_ram,
    largest_activations,
    largest_graphs,
    take_stock,
)


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("shape", [(64, 32), (8, 256)])
def test_a_forward_takes_no_more_than_was_told(
    quantization: str, shape: tuple[int, int], example_engine: Callable[[str], Engine]
) -> None:
    encoder = example_engine(quantization).encoder
    ids = torch.full(shape, 5)
    gc.collect()
    with torch.inference_mode():
        encoder.bank.route([0] * len(ids))
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = status_bytes("VmRSS")
        encoder.model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))
        taken = status_bytes("VmHWM") - before
    assert 0 < taken <= largest_activations(encoder, ids.numel())


def test_stock_is_taken_of_all_that_is_held(example_engine: Callable[[str], Engine]) -> None:
    plain, small = (
        take_stock(example_engine(q).encoder, max_tokens=2048, host_bytes=GIB)
        for q in ("none", "int8")
    )
    parameters = example_engine("none").encoder.model.parameters()
    assert plain.weights >= sum(p.nbytes for p in parameters) > 2 * 10**7
    assert small.weights < 0.7 * plain.weights
    assert plain.bank == small.bank == pytest.approx(GIB, rel=0.01)
    assert plain.host == GIB
    plain.check()


def test_what_does_not_fit_is_refused_with_what_to_change() -> None:
    fits = Memory(weights=4 * GIB, bank=GIB, activations=GIB, host=GIB, available=7 * GIB)
    fits.check()
    with pytest.raises(ConfigError) as refused:
        replace(fits, available=7 * GIB - 1).check()
    told = str(refused.value)
    assert "weights 4.00 + bank 1.00 + activations 1.00 + host 1.00 of 7.00 GiB" in told
    assert "lower bank_gib, max_host_gib or max_batch_tokens" in told
    with pytest.raises(ConfigError, match="lower bank_gib or max_batch_tokens"):
        replace(fits, host=0, available=GIB).check()


@pytest.mark.parametrize(("limit", "most"), [("max", None), (str(3 * GIB), GIB)])
def test_a_container_s_limit_counts(
    limit: str, most: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{2 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 2}\nactive_file 7\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    # Of what is used, half a GiB are files that were read, which give way.
    assert available_ram() == most + GIB // 2 if most else available_ram() > GIB


def test_a_bank_that_cannot_be_had_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"bank_gib=1e\+06 is more memory than there is on cpu"):
        Bank(10**6 * GIB, torch.float32, width=64, device=torch.device("cpu"))


def test_graphs_take_a_forward_of_their_own_and_an_output_each(
    example_engine: Callable[[str], Engine],
) -> None:
    encoder = example_engine("none").encoder
    assert largest_graphs(encoder, 100) == largest_activations(encoder, 100) + 16 * 100 * 384 * 4
    assert largest_graphs(encoder, 16384) == largest_graphs(encoder, MAX_TOKENS)
