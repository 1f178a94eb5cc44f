"""The base's linears, quantised to fit the device; heads never are.

A row's answer must not depend on its neighbours, so every activation is scaled by itself: int8 on
a CPU scales each token, and bitsandbytes' outlier columns, which it picks from the whole batch, are
switched off. Only this module and `int8` know how a quantised linear is made.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from deployments.model.fp32 import Fp32Linear, has_onednn
from deployments.model.int8 import Int8Linear, int8_is_exact

Quantization = Literal["none", "int8", "nf4"]


def choose(asked: str, device: torch.device) -> Quantization:
    """Return the quantisation to use; `auto` is nf4 on a GPU, int8 on a CPU that can.

    Raises:
        ValueError: int8 was asked for on a CPU whose int8 products saturate.
    """
    if asked == "auto":
        if device.type == "cuda":
            return "nf4"
        return "int8" if int8_is_exact() else "none"
    if asked == "int8" and device.type == "cpu" and not int8_is_exact():
        raise ValueError(
            "quantization=int8 would give wrong answers on this CPU, whose int8 products overflow "
            "(it has no VNNI instructions); use quantization=none"
        )
    if asked not in ("none", "int8", "nf4"):
        raise ValueError(f"quantization={asked!r} is not one of auto, none, int8, nf4")
    return asked  # type: ignore[return-value]


def quantize(
    model: nn.Module, skip: Collection[str], quantization: Quantization, device: torch.device
) -> None:
    """Replace every linear of a model in place, but those whose module path is in `skip`.

    A linear that the checkpoint brings quantised stays as it is, as do all that are not to be
    quantised, but on a CPU in fp32, where they are computed faster.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            _stay_exact(module)
    if quantization == "none" and not (device.type == "cpu" and has_onednn()):
        return
    kinds = (nn.Linear, Conv1D)
    linears = [(n, m) for n, m in model.named_modules() if type(m) in kinds and n not in skip]
    if quantization == "none":
        linears = [(n, m) for n, m in linears if m.weight.dtype == torch.float32]
    for path, module in linears:
        parent, _, name = path.rpartition(".")
        new = _quantized(_as_linear(module), quantization, device)
        setattr(model.get_submodule(parent), name, new)


def _quantized(linear: nn.Linear, quantization: Quantization, device: torch.device) -> nn.Module:
    if quantization == "none":
        return Fp32Linear(linear)
    if quantization == "int8" and device.type == "cpu":
        return Int8Linear(linear)
    return _bitsandbytes(linear, quantization, device)


def _as_linear(module: nn.Module) -> nn.Linear:
    """Return a linear as it is, and a Conv1D, whose weight is [in, out], as one."""
    if isinstance(module, nn.Linear):
        return module
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    linear.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=False)
    linear.bias = module.bias  # type: ignore[assignment]
    return linear


def _bitsandbytes(linear: nn.Linear, quantization: Quantization, device: torch.device) -> nn.Module:
    # Imported here: it looks for GPUs at import, which only a quantised base needs.
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_not_of_casts)
    shape: dict[str, Any] = {
        "input_features": linear.in_features,
        "output_features": linear.out_features,
        "bias": linear.bias is not None,
    }
    new: nn.Module
    if quantization == "nf4":
        new = bnb.nn.Linear4bit(
            **shape,
            compute_dtype=linear.weight.dtype,
            compress_statistics=True,  # "double quantisation" of QLoRA, arXiv:2305.14314
            quant_type="nf4",
        )
        new.weight = bnb.nn.Params4bit(
            linear.weight.data,
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            module=new,
        )
        _stay_exact(new)
    else:
        new = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False, threshold=0.0)
        new.weight = bnb.nn.Int8Params(
            linear.weight.data, requires_grad=False, has_fp16_weights=False
        )
    new.bias = linear.bias
    return new.to(device).eval()


def _not_of_casts(record: logging.LogRecord) -> bool:
    """Drop a line that every int8 product of bf16 inputs logs."""
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def _stay_exact(linear4bit: nn.Module) -> None:
    """Switch off a fused kernel that CPUs with AVX-512-BF16 have.

    It rounds inputs and outputs to bf16 whatever compute_dtype says, so that padding moves an
    answer, and lets no gradient through.
    """
    linear4bit.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
