"""PEFT with all adapters loaded into one model: switched between, or mixed in a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel


def answer_mixed(
    model: PeftModel, ids: torch.Tensor, mask: torch.Tensor, adapters: Sequence[str]
) -> torch.Tensor:
    """One forward of rows of several adapters ("Inference with different LoRA adapters")."""
    with torch.inference_mode():
        logits: torch.Tensor = model(
            input_ids=ids, attention_mask=mask, adapter_names=[*adapters]
        ).logits
    return logits


def answer_in_a_loop(
    model: PeftModel, ids: torch.Tensor, mask: torch.Tensor, adapters: Sequence[str]
) -> torch.Tensor:
    """A forward for each adapter, of its rows, after `set_adapter`."""
    logits = torch.empty(len(ids), 2)
    with torch.inference_mode():
        for adapter in dict.fromkeys(adapters):
            rows = [row for row, name in enumerate(adapters) if name == adapter]
            model.set_adapter(adapter)
            logits[rows] = model(input_ids=ids[rows], attention_mask=mask[rows]).logits
    return logits
