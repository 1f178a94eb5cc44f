"""One adapter merged into its base: one model, one task, no adapter left. The ceiling."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, PreTrainedModel


def merged_model(base: str, adapter: str, num_labels: int = 2) -> PreTrainedModel:
    """Return the base with an adapter's folder merged into it, as the inference guide does."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    merged: PreTrainedModel = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return merged.eval()


def answer_alone(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """One forward of a model that knows one task; [rows, labels]."""
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits
