from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from adapters.directory import Directory
from deployments.rows import Facts

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
    "guessed": [],
    "method": "lora",
    "rank": 8,
    "targets": ["query"],
    "num_bytes": 1024,
}


@pytest.fixture
def make_facts() -> Callable[..., Facts]:
    def make_facts(**changes: Any) -> Facts:
        return {**GOOD, **changes}

    return make_facts


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
