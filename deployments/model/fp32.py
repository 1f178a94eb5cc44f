"""A linear in fp32 on a CPU, computed by oneDNN: docs/adr/0013."""

from __future__ import annotations

import torch
from torch import nn


class Fp32Linear(nn.Linear):
    """A linear whose product goes through oneDNN, where torch's own goes through MKL.

    On AMD that takes twice as long. The weight is the linear's own, as it lies: oneDNN's order of
    it would be a second copy, for little.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Share a linear's weight, [out, in], fp32, CPU, and its bias."""
        nn.Module.__init__(self)  # not nn.Linear's: it would make weights
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out], fp32."""
        if torch.is_grad_enabled():  # the product below has none
            return super().forward(input)
        # A private name. Should it go, super().forward is what it computes.
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            input, self.weight, self.bias, "none", [], ""
        )
        return y


def has_onednn() -> bool:
    """Whether this build of torch has oneDNN, and this CPU instructions that it is fast with."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in (
        "AVX2",
        "AVX512",
    )
