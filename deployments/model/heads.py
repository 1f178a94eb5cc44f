"""What follows the encoder: one head graph a task type, and each row goes through its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


class HeadGraph(nn.Module):
    """A transformers classifier without its encoder: hidden states in, logits out.

    The class's own forward runs, so pooling, activations and the order of its modules are right by
    construction; in the encoder's place it finds what the encoder has given already.
    """

    def __init__(self, model: PreTrainedModel, pad_id: int) -> None:
        """Take a model's head; its encoder is let go."""
        super().__init__()
        self.model = model
        self.pad_id = pad_id
        self.given = _Given()
        setattr(model, model.base_model_prefix, self.given)
        # Decoders pool at the last token that is not padding.
        model.config.get_text_config().pad_token_id = pad_id

    def forward(
        self,
        encoded: ModelOutput,
        ids: torch.Tensor,
        mask: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Answer some rows of a batch.

        Args:
            encoded: What the encoder gave, [all rows, tokens, hidden] and perhaps pooled.
            ids: [all rows, tokens], int64.
            mask: [all rows, tokens], int64, 1 for a token and 0 for padding.
            rows: Indices of the rows, int64; None for all of them.

        Returns:
            Logits [rows, most labels], of a token classifier [rows, tokens, most labels], fp32.
        """
        ids = torch.where(mask.bool(), ids, self.pad_id)
        if rows is not None:
            ids, mask = ids[rows], mask[rows]
            parts = {name: part[rows] for name, part in encoded.items() if torch.is_tensor(part)}
            encoded = type(encoded)(**parts)
        self.given.output = encoded
        try:
            logits: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        finally:
            self.given.output = None
        return logits


class _Given(nn.Module):
    """Stands where the encoder was, and returns what it has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.output: ModelOutput | None = None

    def forward(self, *_: Any, **__: Any) -> ModelOutput | None:
        return self.output
