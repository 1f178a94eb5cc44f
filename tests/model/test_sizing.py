"""What the calculator says, held against a real bank, real weights and a real LRU."""

import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel, GPT2Config, GPT2Model, RobertaConfig, RobertaModel

from adapters.directory import Directory
from benchmarks.resident import lora, save_adapter
from deployments.model.engine import Engine
from deployments.model.graphs import MAX_TOKENS
from deployments.model.memory import largest_activations, take_stock
from deployments.model.sizing import Base, Group, hit_rate, main, num_replicas

GROUPS = ("1x1:query,value:2", "1x8:query,key,value:3", "1x16:all-linear:40")


def bank_bytes(engine: Engine, base: str, folder: Path, group: Group) -> int:
    config = lora("q,v", group.rank)
    config.target_modules = "all-linear" if group.targets == ("all-linear",) else set(group.targets)
    config.fan_in_fan_out = "c_attn" in group.targets
    save_adapter(base, folder / "task", config, group.labels)
    return engine.read(Directory(folder).read("task")).num_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_takes_of_the_bank_what_was_computed(
    dtype: torch.dtype, example_base: str, tmp_path: Path
) -> None:
    engine = Engine(example_base, quantization="none", device="cpu", dtype=dtype)
    base, groups = Base(example_base), [Group.parse(text) for text in GROUPS]
    computed = [base.adapter_bytes(group, dtype.itemsize) for group in groups]
    taken = [bank_bytes(engine, example_base, tmp_path, group) for group in groups]
    assert computed == taken


@pytest.mark.parametrize(
    ("cls", "config", "targets"),
    [
        pytest.param(  # a head of two linears
            RobertaModel,
            RobertaConfig(
                vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=48, max_position_embeddings=40,
            ),
            "query,intermediate.dense",
            id="roberta",
        ),
        pytest.param(  # Conv1D, whose weights lie otherwise; a head without a bias
            GPT2Model,
            GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=40),
            "c_attn,c_proj",
            id="gpt2",
        ),
    ],
)  # fmt: skip
def test_other_architectures(
    cls: Any, config: Any, targets: str, save_base: Callable[..., str], tmp_path: Path
) -> None:
    base, group = save_base(cls, config), Group.parse(f"1x4:{targets}:3")
    engine = Engine(base, quantization="none", device="cpu", bank_bytes=2**20)
    assert Base(base).adapter_bytes(group, 4) == bank_bytes(engine, base, tmp_path, group)


@pytest.mark.parametrize(("quantization", "within"), [("none", 0.01), ("int8", 0.01), ("nf4", 0.1)])
def test_the_base_takes_what_was_computed(
    quantization: str, within: float, example_engine: Callable[[str], Engine], example_base: str
) -> None:
    # What nf4 keeps of its scales is no tensor that a module registers, hence the 10 %.
    held = take_stock(example_engine(quantization).encoder, 1024, 0).weights
    assert Base(example_base).weight_bytes(quantization, 4) == pytest.approx(held, rel=within)


def test_activations_are_those_that_a_replica_reserves(
    example_engine: Callable[[str], Engine], example_base: str
) -> None:
    base, encoder = Base(example_base), example_engine("none").encoder
    plain = largest_activations(encoder, 16384)
    assert base.activation_bytes(16384, 4, graphs=False) == plain
    graphs = 16 * MAX_TOKENS * 384 * 4 + largest_activations(encoder, MAX_TOKENS)
    assert base.activation_bytes(16384, 4, graphs=True) == plain + graphs


@pytest.mark.parametrize(("num_slots", "exponent"), [(16, 1.0), (64, 1.0), (64, 0.0), (100, 0.6)])
def test_hits_are_those_of_an_lru(num_slots: int, exponent: float) -> None:
    dice, count, rounds = random.Random(0), 200, 40_000
    weights = [1 / rank**exponent for rank in range(1, count + 1)]
    resident: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for step, asked in enumerate(dice.choices(range(count), weights, k=2 * rounds)):
        hits += step >= rounds and asked in resident
        resident[asked] = None
        resident.move_to_end(asked)
        if len(resident) > num_slots:
            resident.popitem(last=False)
    assert hit_rate(count, num_slots, exponent) == pytest.approx(hits / rounds, abs=0.015)
    assert hit_rate(count, count, exponent) == 1


def test_replicas_have_one_to_spare() -> None:
    assert num_replicas(texts_per_s=600, tokens=20, tokens_per_s=20_000) == 2
    assert num_replicas(texts_per_s=601, tokens=20, tokens_per_s=20_000) == 3


def test_the_command_prints_the_keys_that_are_configured(
    example_base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    load = ["--rate", "500", "--tokens", "20", "--tokens-per-s", "20000"]
    assert main([example_base, "300x8:query,value:2", "100x16:all-linear:5", *load]) == 0
    told = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert told.keys() >= {"weights", "bank_gib", "max_host_gib", "max_replicas"}
    assert "holds all 400" in told["bank_gib"]


@pytest.mark.parametrize(
    ("base", "group", "words"),
    [
        (None, "300x8:quer:2", "no linear is called 'quer'; there are dense, key, query, value"),
        (None, "300:query:2", "is not COUNTxRANK:TARGET,…:LABELS (300x8:query,value:2)"),
        (None, "0x8:query:2", "is not COUNTxRANK"),
        ("./nowhere", "1x8:query:2", "is neither a folder nor a hub id"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    base: str | None,
    group: str,
    words: str,
    example_base: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([base or example_base, group]) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_an_unquantised_base_takes_its_parameters(
    save_base: Callable[..., str], tiny_config: Any
) -> None:
    base = save_base(BertModel, tiny_config)
    parameters = sum(p.numel() for p in BertModel(tiny_config).parameters())
    # And a head of two labels.
    assert Base(base).weight_bytes("none", 4) == 4 * (parameters + 2 * 32 + 2)
