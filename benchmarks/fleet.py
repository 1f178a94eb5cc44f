"""Stores of many small adapters, as PEFT saves them, every one a version of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from adapters.store import CONFIG, WEIGHTS


def write_fleet(
    folder: Path, base: str, count: int, ranks: Sequence[int] = (8,), **config: Any
) -> list[str]:
    """Write `count` adapters of two labels on query and value, and return their tasks' names.

    PEFT saves one of each rank; the others are its files with a head of their own, which is enough
    to make each another version that answers otherwise.
    """
    moulds = [_mould(folder / f"rank-{rank}", base, rank, config) for rank in ranks]
    names = [f"task-{index:05d}" for index in range(count)]
    dice = torch.Generator().manual_seed(0)
    for index, name in enumerate(names):
        settings, tensors = moulds[index % len(moulds)]
        target = folder / name
        target.mkdir()
        (target / CONFIG).write_bytes(settings)
        heads = [key for key in tensors if key.endswith("classifier.weight")]
        own = {key: torch.randn(tensors[key].shape, generator=dice) for key in heads}
        save_file({**tensors, **own}, target / WEIGHTS, metadata={"format": "pt"})
    return names


def _mould(
    folder: Path, base: str, rank: int, config: dict[str, Any]
) -> tuple[bytes, dict[str, torch.Tensor]]:
    """PEFT's config and tensors of an adapter whose B is not zero; its folder goes again."""
    torch.manual_seed(rank)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        **{"target_modules": ["query", "value"], **config},
    )
    peft = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    peft.save_pretrained(str(folder))
    saved = (folder / CONFIG).read_bytes(), load_file(folder / WEIGHTS)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()
    return saved
