"""Bases and adapters to measure on: the example's base, and BERT-base with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

ROOT = Path(__file__).resolve().parents[1]
TARGETS: dict[str, dict[str, Any]] = {
    "q,v r=8": {"target_modules": ["query", "value"], "r": 8},
    "all-linear r=16": {"target_modules": "all-linear", "r": 16},
}


def base_folder(name: str, folder: Path) -> str:
    """The folder of `MiniLM` (6 layers, 384 wide) or `BERT-base` (12 layers, 768 wide)."""
    if name == "MiniLM":
        return str(ROOT / "examples" / "base")
    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(folder / name)
    return str(folder / name)


def with_adapters(base: str, targets: str | dict[str, Any], count: int) -> PeftModel:
    """PEFT's model with so many random adapters of two labels, `a0`, `a1`, …."""
    kind = TARGETS[targets] if isinstance(targets, str) else targets
    torch.manual_seed(0)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, **kind)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    peft = get_peft_model(model, config, adapter_name="a0")
    for index in range(1, count):
        peft.add_adapter(f"a{index}", config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return peft.eval().requires_grad_(False)


def save_each(peft: PeftModel, store: Path) -> None:
    """Save every adapter of a model as a task of its own."""
    for name in peft.peft_config:
        peft.save_pretrained(str(store / "_"), selected_adapters=[name])
        (store / "_" / name).rename(store / name)
    shutil.rmtree(store / "_")
