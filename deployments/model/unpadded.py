"""Attention that does not work on padding (GPU): docs/adr/0008.

Queries, keys and values stay as they lie, padded on the right. Every row begins at a multiple of
the padded length, and how many of its keys count is a tensor on the device: nothing is gathered,
and no number on the host depends on it, so that a recorded CUDA graph stays true for any lengths.

A decoder needs not even that. No token of it sees what is on its right, so a mask for the padding
changes no token's answer; without one the fused kernels can be taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

logger = logging.getLogger("ray.serve")

_NAME = "onebase_unpadded"
_TAG = "onebase_padding"  # lost, as it must be, when a model makes another mask of this one
_GROUPS = "num_key_value_groups"  # what `sdpa` asks a module for
_HALVES = (torch.bfloat16, torch.float16)
_MAX_SIZE = 256  # of a head; what FlashAttention takes
_HARMLESS = {"scaling", "is_causal", "position_ids"}  # the mask says what is causal

Kernel = Callable[..., Any]  # as torch.nn.attention.varlen.varlen_attn


class Padding(NamedTuple):
    """What a plain mask says.

    Attributes:
        lengths: [rows], int32, tokens of each row.
        starts: [rows + 1], int32, where rows begin if all lie behind each other.
        causal: Whether a token sees only what is on its left.
    """

    lengths: torch.Tensor
    starts: torch.Tensor
    causal: bool


def unpad(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype, kernel: Kernel | None = None
) -> None:
    """Let a model attend without padding, if the kernel agrees with `sdpa` on this device.

    A model that brings its own attention (DeBERTa, MPNet) is left as it is.

    Args:
        model: The base.
        device: Where it will be.
        dtype: What it computes in; no kernel takes fp32.
        kernel: In the place of torch's, which no CPU has.
    """
    if not model._supports_attention_backend or dtype not in _HALVES:
        return
    try:
        kernel = kernel or _kernel()
        fault = _fault(kernel, model.config.get_text_config(), device, dtype)
    except Exception as error:
        fault = repr(error)
    if fault is not None or kernel is None:
        logger.warning("attention runs over padding too, on sdpa: %s", fault)
        return
    AttentionInterface.register(_NAME, partial(_attend, kernel))
    AttentionMaskInterface.register(_NAME, _mask)
    model.set_attn_implementation(_NAME)


def _kernel() -> Kernel:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def _fault(
    kernel: Kernel, config: PretrainedConfig, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return where the kernel differs from `sdpa` in fp32 by more than rounding, None if nowhere.

    Tried on random rows of the base's heads. One key too many is seen: what it brings is large.
    """
    heads: int = config.num_attention_heads
    of_keys: int = getattr(config, "num_key_value_heads", None) or heads
    size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    module = nn.Module()
    setattr(module, _GROUPS, heads // of_keys)
    dice = torch.Generator(device).manual_seed(0)

    def random(num_heads: int) -> torch.Tensor:
        return torch.randn(*shape, num_heads, size, generator=dice, device=device).transpose(1, 2)

    for tokens in (1, 24, 160):  # kernels are chosen by length too
        lengths = torch.tensor([1, min(2, tokens), -(-tokens // 2), tokens], device=device)
        shape = (len(lengths), tokens)
        real = torch.arange(tokens, device=device) < lengths[:, None]
        query, key, value = (random(count).to(dtype) for count in (heads, of_keys, of_keys))
        value = value.masked_fill(~real[:, None, :, None], 1000)
        for function in (bidirectional_mask_function, causal_mask_function):
            mask = _mask(
                batch_size=len(lengths),
                q_length=tokens,
                kv_length=tokens,
                q_offset=0,
                kv_offset=0,
                mask_function=function,
                attention_mask=real,
                device=device,
            )
            with torch.inference_mode():
                got, _ = _attend(kernel, module, query, key, value, mask)
                want, _ = sdpa_attention_forward(
                    module, query.float(), key.float(), value.float(), mask
                )
            error = float((got.float() - want)[real].abs().max())
            # Weights and answers are rounded once each, by half of eps; twice that is let pass.
            if not error <= 2 * torch.finfo(dtype).eps * float(want[real].abs().max()):
                return f"{function.__name__}, {tokens} tokens: the kernel is off by {error:.2g}"
    return None


def _mask(**kwargs: Any) -> torch.Tensor | None:
    """Return transformers' mask; a plain one, of a right-padded batch, has its `Padding` on it.

    All that this engine runs is padded on the right. That no other position is masked is in the
    function that the mask is made of, so it is known without looking at any value.
    """
    function, real = kwargs["mask_function"], kwargs.get("attention_mask")
    mask: torch.Tensor | None
    if (
        function not in (bidirectional_mask_function, causal_mask_function)
        or real is None
        or real.shape != (kwargs["batch_size"], kwargs["kv_length"])
        or kwargs["q_length"] != kwargs["kv_length"]
        or kwargs.get("q_offset", 0) != 0
        or kwargs.get("kv_offset", 0) != 0
    ):
        mask = sdpa_mask(**kwargs)
        return mask
    # For calls that are unusual. Whether it may be skipped would be asked of the device.
    never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(**kwargs | never)
    num_rows, tokens = real.shape
    lengths = real.sum(1, dtype=torch.int32)
    starts = torch.arange(num_rows + 1, dtype=torch.int32, device=real.device) * tokens
    setattr(mask, _TAG, Padding(lengths, starts, function is causal_mask_function))
    return mask


def _attend(
    kernel: Kernel,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as `sdpa` does, and at tokens alone; [rows, heads, tokens, size] each.

    What padding gets is not what `sdpa` gives it, and nothing reads it.

    Returns:
        [rows, tokens, heads, size].
    """
    padding: Padding | None = getattr(attention_mask, _TAG, None)
    answer: tuple[torch.Tensor, None]
    if padding is None or _is_unusual(query, key, value, kwargs):
        answer = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return answer
    if padding.causal:
        causal = kwargs | {"is_causal": True}
        answer = sdpa_attention_forward(module, query, key, value, None, **causal)
        return answer
    num_rows, num_heads, tokens, _ = query.shape
    attended: torch.Tensor = kernel(
        *(part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)),
        padding.starts,
        padding.starts,
        tokens,
        tokens,
        scale=kwargs.get("scaling"),
        enable_gqa=key.shape[1] != num_heads,
        seqused_k=padding.lengths,
    )
    return attended.unflatten(0, (num_rows, tokens)), None


def _is_unusual(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
) -> bool:
    """Return whether a call wants what the kernel lacks: a bias, a window, gradients, …."""
    size = query.shape[-1]
    more = [given for name, given in kwargs.items() if name not in _HARMLESS]
    return (
        query.dtype not in _HALVES
        or size > _MAX_SIZE
        or size % 8 != 0
        or key.shape != value.shape
        or key.shape[2:] != query.shape[2:]
        or torch.is_grad_enabled()
        or any(torch.is_tensor(given) or given for given in more)
    )
