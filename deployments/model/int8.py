"""A linear in int8 on a CPU, each token with a scale of its own: docs/adr/0001 and 0004."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_SMALLEST = 1e-12  # a token of zeros has no scale


def int8_is_exact() -> bool:
    """Multiply the largest int8 values and compare: without VNNI, 16-bit partial sums saturate."""
    extreme = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((_multiply(extreme, extreme) == 64 * 127 * 127).all())


class Int8Linear(nn.Linear):
    """A linear with int8 weights, one scale an output, and int8 activations, one scale a token.

    y[t] = (q(x[t]) · Qᵀ) · s_x[t] · s_w + bias, with q and Q rounded to ±127 (absmax). The integer
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
        scale = weight.abs().amax(dim=1).clamp_min(_SMALLEST) / 127
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
        if not torch.is_grad_enabled():  # an autograd Function has its price on short inputs
            return self.product(input)
        return _StraightThrough.apply(input, self)  # type: ignore[no-any-return]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The product without a gradient."""
        flat = x.reshape(-1, self.in_features).float()
        rows, scale = _quantize(flat)
        sums = _multiply(rows, self.quantized)
        # In place: of wide results it is the memory traffic that costs, not the arithmetic.
        y = sums.view(torch.float32)
        y.copy_(sums).mul_(scale)
        y.mul_(self.scale) if self.bias is None else torch.addcmul(self.bias, y, self.scale, out=y)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


class _StraightThrough(torch.autograd.Function):
    """Lets gradients through to the input as if the weight were dequantised and x not rounded."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: Int8Linear) -> torch.Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] @ ctx.linear.weight.to(grads[0].dtype), None


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round [tokens, in], fp32, to int8 and one scale a token, [tokens, 1], fp32."""
    # Two reductions only read; |x| would be written to memory and read again.
    largest = torch.maximum(x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True).neg_())
    scale = largest.clamp_min_(_SMALLEST).div_(127)
    return x.div(scale).round_().to(torch.int8), scale


def _multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply int8 [tokens, in] by [out, in] transposed, exactly: [tokens, out], int32."""
    # A private name. Should it go: torch.ops.onednn.qlinear_pointwise, as fast on many tokens, but
    # it takes packed weights, and rows in u8 with zero point 128 (docs/adr/0004).
    return torch._int_mm(rows, weight.t())
