"""The base's linears, quantised to fit the device; heads never are.

A row's answer must not depend on its neighbours, so every activation is scaled by itself: int8 on
a CPU scales each token, and bitsandbytes' outlier columns, which it picks from the whole batch, are
switched off. This module is the only one that knows how a quantised linear is made.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

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


def int8_is_exact() -> bool:
    """Multiply the largest int8 values and compare: without VNNI, 16-bit partial sums saturate."""
    extreme = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(extreme, extreme.t()) == 64 * 127 * 127).all())


def quantize(
    model: nn.Module, skip: Collection[str], quantization: Quantization, device: torch.device
) -> None:
    """Replace every linear of a model in place, but those whose module path is in `skip`.

    A linear that the checkpoint brings quantised stays as it is.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            _stay_exact(module)
    if quantization == "none":
        return
    kinds = (nn.Linear, Conv1D)
    linears = [(n, m) for n, m in model.named_modules() if type(m) in kinds and n not in skip]
    for path, module in linears:
        linear = _as_linear(module)
        parent, _, name = path.rpartition(".")
        new: nn.Module
        if device.type == "cpu" and quantization == "int8":
            new = Int8Linear(linear)
        else:
            new = _bitsandbytes(linear, quantization, device)
        setattr(model.get_submodule(parent), name, new)


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


class Int8Linear(nn.Linear):
    """A linear with int8 weights, one scale an output, and int8 activations, one scale a token.

    y[t] = (q(x[t]) · Qᵀ) · s_w · s_x[t] + bias, with q and Q rounded to ±127 (absmax). The integer
    product is exact, so a token's result depends on that token alone.
    """

    quantized: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """Quantise a linear's weight, [out, in], float, CPU."""
        nn.Module.__init__(self)  # not nn.Linear's: it would register a float weight
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
        quantized = (weight / scale.unsqueeze(1)).round().to(torch.int8)
        self.register_buffer("quantized", quantized.contiguous())  # [out, in]
        self.register_buffer("scale", scale)  # [out]
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight as the product sees it, [out, in], fp32; made anew at every read."""
        return self.quantized.float() * self.scale.unsqueeze(1)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out], in the dtype of the input."""
        return _Int8Product.apply(input, self)  # type: ignore[no-any-return]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The product without a gradient."""
        flat = x.reshape(-1, self.in_features).float()
        scale = flat.abs().amax(dim=1, keepdim=True).clamp_min(1e-12).div_(127)
        rows = flat.div(scale).round_().to(torch.int8)
        y = torch._int_mm(rows, self.quantized.t()).float().mul_(scale)
        y = y.mul_(self.scale) if self.bias is None else torch.addcmul(self.bias, y, self.scale)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


class _Int8Product(torch.autograd.Function):
    """Lets gradients through to the input as if the weight were dequantised and x not rounded."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: Int8Linear) -> torch.Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] @ ctx.linear.weight.to(grads[0].dtype), None
