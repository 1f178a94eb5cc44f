from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from adapters.directory import Directory
from deployments.rows import Facts
from deployments.snapshot import TaskRecord
from deployments.tokens import Tokenizer

GOOD: Facts = {
    "task": "mood",
    "version": "0" * 8,
    "labels": ["no", "yes"],
    "problem_type": "single_label_classification",
    "threshold": None,
    "max_length": 16,
    "truncation": "longest_first",
    "overflow": "truncate",
    "stride": None,
    "window_scores": None,
    "negative_label": None,
    "aggregation": None,
    "pair": False,
    "priority": "normal",
    "latency_target_ms": None,
    "guessed": [],
    "rules": "44136fa3",
    "method": "lora",
    "rank": 8,
    "targets": ["query"],
    "num_bytes": 1024,
}


NUM_WORDS = 1000
CLS, SEP = NUM_WORDS + 1, NUM_WORDS + 2


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Its ids spell the words: w17 is 17."""
    words = {f"w{n}": n for n in range(NUM_WORDS)}
    specials = {"[UNK]": NUM_WORDS, "[CLS]": CLS, "[SEP]": SEP}
    backend = Backend(models.WordLevel(words | specials, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    return Tokenizer(
        {
            "backend": backend.to_str(),
            "max_length": 512,
            "truncation_side": "right",
            "split_special_tokens": False,
            "type_ids": True,
            "unk_id": NUM_WORDS,
        }
    )


@pytest.fixture
def make_facts() -> Callable[..., Facts]:
    def make_facts(**changes: Any) -> Facts:
        return {**GOOD, **changes}

    return make_facts


@pytest.fixture
def make_record() -> Callable[..., TaskRecord]:
    """A record of versions by name, the first of them active unless said."""

    def make_record(*versions: str, **changes: Any) -> TaskRecord:
        came = {"created_s": 1.0, "by": "me", "source": "upload"}
        return TaskRecord.model_validate(
            {
                "revision": 1,
                "active": versions[0],
                "versions": dict.fromkeys(versions, came),
                **changes,
            }
        )

    return make_record


@pytest.fixture
def store(tmp_path: Path) -> Directory:
    return Directory(tmp_path / "store")


@pytest.fixture
def weights() -> Callable[[int], bytes]:
    """Content of an adapter's weights; another number makes another version."""

    def weights(number: int) -> bytes:
        return save({"x": torch.full((64,), float(number))})

    return weights


@pytest.fixture
def write(store: Directory, weights: Callable[[int], bytes]) -> Callable[..., Path]:
    """Put a folder into the store that looks like an adapter's; None leaves the weights out."""

    def write(task: str = "mood", number: int | None = 1) -> Path:
        folder = store.root / task
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")
        if number is not None:
            (folder / "adapter_model.safetensors").write_bytes(weights(number))
        return folder

    return write
