"""DeBERTa's attention to relative positions, for projections that differ from row to row.

Its query and key projections also read the embeddings of relative positions, which have no row
dimension. With LoRA on them each row has its own positions, and the class's method, which repeats
one set for all rows, cannot take that. This is the one method of a base that we write anew.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention


def per_row_positions(model: PreTrainedModel) -> None:
    """Let every attention of a DeBERTa-v2/v3 read positions row by row."""
    for module in model.modules():
        if isinstance(module, DisentangledSelfAttention):
            module.disentangled_attention_bias = MethodType(  # type: ignore[method-assign]
                _position_scores, module
            )


def _position_scores(
    attention: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    relative_pos: torch.Tensor,
    rel_embeddings: torch.Tensor,
    scale_factor: int,
) -> torch.Tensor:
    """Content to position, and position to content (arXiv:2006.03654, equations 9 to 13).

    Args:
        attention: The module.
        query: [rows · heads, tokens, size].
        key: Likewise.
        relative_pos: Bucketed distances, [1, tokens, tokens], int64.
        rel_embeddings: [2 · span, hidden], or [rows, 2 · span, hidden] where rows differ.
        scale_factor: How many kinds of scores are summed.

    Returns:
        [rows · heads, tokens, tokens], to be added to the scores of content to content.
    """
    span, num_heads = attention.pos_ebd_size, attention.num_attention_heads
    shared = rel_embeddings.ndim == 2
    positions = (rel_embeddings.unsqueeze(0) if shared else rel_embeddings)[:, : 2 * span]
    distances = relative_pos.to(query.device, torch.int64).reshape(1, *relative_pos.shape[-2:])
    shape = (len(query), -1, -1)

    def project(linear: nn.Module) -> torch.Tensor:
        """Return [rows · heads, size, 2 · span]: one set for all rows, or one for each."""
        heads: torch.Tensor = attention.transpose_for_scores(linear(positions), num_heads)
        return heads.repeat(len(query) // len(heads), 1, 1).transpose(1, 2)

    own = not attention.share_att_key
    scores = torch.zeros((), dtype=query.dtype, device=query.device)
    scale = torch.tensor(query.shape[-1] * scale_factor).sqrt().to(query.dtype)
    if "c2p" in attention.pos_att_type:
        at = (distances + span).clamp(0, 2 * span - 1).expand(shape)
        towards = project(attention.pos_key_proj if own else attention.key_proj)
        scores = scores + (query @ towards).gather(-1, at) / scale
    if "p2c" in attention.pos_att_type:
        at = (span - distances).clamp(0, 2 * span - 1).expand(shape)
        towards = project(attention.pos_query_proj if own else attention.query_proj)
        scores = scores + (key @ towards).gather(-1, at).transpose(1, 2) / scale
    return scores
