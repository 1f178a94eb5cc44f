"""`auto`: all linears, rank 16, 16 labels and 64 slots; more for the store, less for the memory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification

from adapters.store import Store
from deployments.base import BaseName
from deployments.config import GIB, Args, ConfigError
from deployments.model.encoder import Encoder
from deployments.model.sizing import Sizes, choose_sizes


@pytest.fixture(scope="module")
def wide_store(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store whose only adapter has rank 24 on two targets, and 40 labels."""
    root = tmp_path_factory.mktemp("wide")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=40)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=24, target_modules=["query", "value"])
    get_peft_model(model, config).save_pretrained(root / "wide")
    return Store(root)


@pytest.fixture(scope="module")
def sizes_of(tiny_base: str) -> Callable[..., Sizes]:
    def choose(store: Store, **keys: object) -> Sizes:
        args = Args(base_model=tiny_base, adapter_store=str(store.root), **keys)
        return choose_sizes(args, BaseName.parse(tiny_base), store, torch.float32)

    return choose


def test_an_empty_store_gets_the_defaults(sizes_of: Callable[..., Sizes], tmp_path: Path) -> None:
    assert sizes_of(Store(tmp_path)) == Sizes(64, 16, 16, None)


def test_a_store_that_needs_more_gets_more(
    sizes_of: Callable[..., Sizes], wide_store: Store
) -> None:
    assert sizes_of(wide_store) == Sizes(64, 24, 40, None)


def test_what_is_configured_wins(sizes_of: Callable[..., Sizes], wide_store: Store) -> None:
    sizes = sizes_of(
        wide_store, adapter_slots=5, max_lora_rank=8, max_labels=3, lora_targets=["query"]
    )
    assert sizes == Sizes(5, 8, 3, ("query",))


def test_short_memory_gives_fewer_slots_then_only_what_the_store_holds(
    sizes_of: Callable[..., Sizes], wide_store: Store, tiny_base: str
) -> None:
    wide = _row_bytes(tiny_base, Sizes(1, 24, 40, None))
    narrow = _row_bytes(tiny_base, Sizes(1, 24, 40, frozenset({"query", "value"})))
    assert narrow < wide / 2
    some = sizes_of(wide_store, max_bank_gib=11 * wide / GIB)
    assert some.lora_targets is None
    assert 8 <= some.adapter_slots <= 10
    few = sizes_of(wide_store, max_bank_gib=5 * narrow / GIB)
    assert few.lora_targets == {"query", "value"}
    assert (few.max_lora_rank, few.max_labels) == (24, 40)
    assert 3 <= few.adapter_slots <= 4


def test_a_budget_for_no_adapter_at_all_is_refused(
    sizes_of: Callable[..., Sizes], wide_store: Store
) -> None:
    with pytest.raises(
        ConfigError, match=r"max_bank_gib=1e-06 does not hold adapter_slots=auto; raise"
    ):
        sizes_of(wide_store, max_bank_gib=1e-6)


def test_an_embedding_is_found_by_name_and_by_pattern(
    sizes_of: Callable[..., Sizes], tmp_path: Path, wide_store: Store
) -> None:
    for index, targets in enumerate((["query", "word_embeddings"], r".*(query|word_embeddings)")):
        root = tmp_path / str(index)
        shutil.copytree(wide_store.root, root)
        file = root / "wide" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": targets}))
        found = sizes_of(Store(root)).lora_targets
        assert found is not None
        assert "bert.embeddings.word_embeddings" in found
        assert "bert.encoder.layer.1.output.dense" in found


@pytest.mark.parametrize("saved", [[""], ["dense", "classifier"], "LayerNorm", [5], None])
def test_modules_that_a_config_names_and_the_file_has_not_cost_nobody_anything(
    sizes_of: Callable[..., Sizes], tmp_path: Path, wide_store: Store, saved: object
) -> None:
    shutil.copytree(wide_store.root, tmp_path / "store")
    file = tmp_path / "store" / "wide" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "modules_to_save": saved}))
    assert sizes_of(Store(tmp_path / "store")) == Sizes(64, 24, 40, None)


def test_a_broken_folder_counts_as_nothing(
    sizes_of: Callable[..., Sizes], tmp_path: Path, wide_store: Store
) -> None:
    for name, config in {"list": "[]", "torn": '{"r": 9', "text": '{"r": "many"}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(config)
    assert sizes_of(Store(tmp_path)) == Sizes(64, 16, 16, None)


def _row_bytes(base: str, sizes: Sizes) -> int:
    """What a real bank of this size takes a row."""
    encoder = Encoder(
        BaseName.parse(base),
        quantization="none",
        device=torch.device("cpu"),
        dtype=torch.float32,
        num_slots=2,
        max_rank=sizes.max_lora_rank,
        max_labels=sizes.max_labels,
        lora_targets=sizes.lora_targets,
    )
    return encoder.bank.row_bytes


def test_slots_that_were_asked_for_must_fit(
    sizes_of: Callable[..., Sizes], wide_store: Store, tiny_base: str
) -> None:
    narrow = _row_bytes(tiny_base, Sizes(1, 24, 40, frozenset({"query", "value"})))
    budget_gib = 21.5 * narrow / GIB
    assert sizes_of(wide_store, adapter_slots=20, max_bank_gib=budget_gib).adapter_slots == 20
    with pytest.raises(ConfigError, match="does not hold adapter_slots=2000"):
        sizes_of(wide_store, adapter_slots=2000, max_bank_gib=budget_gib)


def test_one_enormous_adapter_does_not_stop_the_start(
    sizes_of: Callable[..., Sizes], tiny_base: str, tmp_path: Path
) -> None:
    (tmp_path / "enormous").mkdir()
    (tmp_path / "enormous" / "adapter_config.json").write_text(
        '{"r": 1024, "target_modules": "all-linear"}'
    )
    (tmp_path / "enormous" / "adapter_model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"{}")
    wide = _row_bytes(tiny_base, Sizes(1, 16, 16, None))
    assert sizes_of(Store(tmp_path)).max_lora_rank == 1024
    small = sizes_of(Store(tmp_path), max_bank_gib=10.5 * wide / GIB)
    assert (small.max_lora_rank, small.lora_targets) == (16, None)
    assert 8 <= small.adapter_slots <= 9
