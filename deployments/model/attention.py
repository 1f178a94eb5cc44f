"""Attention whose sums do not depend on how far a batch is padded: CPU, layers that see padding.

A masked key has weight exactly 0, and adding 0 to a sum changes nothing, as long as the sum is
taken in the same order. The kernel's order depends on the number of keys, but not among multiples
of its vector width. So keys, and nothing else, are padded to such a multiple: docs/adr/0002.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "onebase_steady"
_MULTIPLE = 16  # fp32 lanes of an AVX-512 register; shorter registers divide it


def steady(model: PreTrainedModel) -> None:
    """Let a model's attention give a row the same bits at any padding.

    A model that brings its own attention (DeBERTa, MPNet) is left as it is.
    """
    if model._supports_attention_backend:
        AttentionInterface.register(_NAME, _attend)
        AttentionMaskInterface.register(_NAME, _mask)
        model.set_attn_implementation(_NAME)


def _mask(kv_length: int, **kwargs: Any) -> torch.Tensor:
    """Return transformers' mask, bool [rows, 1, queries, keys], its keys padded with False."""
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(kv_length=-(-kv_length // _MULTIPLE) * _MULTIPLE, **kwargs)
    assert mask is not None  # it may not skip
    return mask


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as `sdpa` does, over as many keys as the mask has; all [rows, heads, tokens, size]."""
    more = (0, 0, 0, attention_mask.shape[-1] - key.shape[2])
    key, value = functional.pad(key, more), functional.pad(value, more)
    attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **kwargs
    )
    return attended
