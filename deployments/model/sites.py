"""The modules that read the bank: LoRA-targeted linears, and the linears of the head."""

from __future__ import annotations

import torch
from torch import nn

from deployments.model.bank import Bank, Field


class LoraSite(nn.Module):
    """A linear of the base, plus each row's own low-rank product.

    y[row] = linear(x[row]) + (x[row]·A[slot(row)])·B[slot(row)], the scaling being part of B.
    """

    def __init__(
        self, linear: nn.Linear, path: str, bank: Bank, dtype: torch.dtype, max_rank: int
    ) -> None:
        """Wrap a linear; its fields must be in the bank (see `fields`)."""
        super().__init__()
        self.linear = linear
        self.bank = bank
        self.name_a, self.name_b = (
            field.name for field in self.fields(linear, path, dtype, max_rank)
        )
        self.a = bank.view(self.name_a)  # [slots, in, max_rank]
        self.b = bank.view(self.name_b)  # [slots, max_rank, out]

    @staticmethod
    def fields(
        linear: nn.Linear, path: str, dtype: torch.dtype, max_rank: int
    ) -> tuple[Field, Field]:
        """Return what a site of this linear takes of a bank row."""
        return (
            Field(f"{path}.lora_A", (linear.in_features, max_rank), dtype),
            Field(f"{path}.lora_B", (max_rank, linear.out_features), dtype),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [rows, tokens, in], or a pooled [rows, in], to the same with out; compute dtype."""
        y: torch.Tensor = self.linear(x)
        if self.name_a not in self.bank.batch.fields:
            return y
        a, b = self.bank.gather(self.a), self.bank.gather(self.b)
        if x.ndim == 2:
            return torch.baddbmm(y.unsqueeze(1), x.unsqueeze(1) @ a, b).squeeze(1)
        return torch.baddbmm(y, x @ a, b)


class HeadSite(nn.Module):
    """A linear that every adapter brings whole: each row is answered by its own, in fp32.

    y[row] = x[row]·W[slot(row)]ᵀ + bias[slot(row)]. Rows of W beyond an adapter's labels are zero.
    """

    def __init__(self, linear: nn.Linear, path: str, bank: Bank) -> None:
        """Take the place of a head linear, whose own weights are never used."""
        super().__init__()
        self.bank = bank
        names = [field.name for field in self.fields(linear, path)]
        self.weight = bank.view(names[0])  # [slots, out, in]
        self.bias = bank.view(names[1]) if linear.bias is not None else None  # [slots, out]

    @staticmethod
    def fields(linear: nn.Linear, path: str) -> tuple[Field, ...]:
        """Return what a site of this linear takes of a bank row."""
        weight = Field(f"{path}.weight", (linear.out_features, linear.in_features), torch.float32)
        bias = Field(f"{path}.bias", (linear.out_features,), torch.float32)
        return (weight, bias) if linear.bias is not None else (weight,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [rows, in] or [rows, tokens, in], any float dtype, to the same with out, fp32."""
        x = x.float()
        rows = x.unsqueeze(1) if x.ndim == 2 else x
        y = rows @ self.bank.gather(self.weight).transpose(1, 2)
        if self.bias is not None:
            y = y + self.bank.gather(self.bias).unsqueeze(1)
        return y.squeeze(1) if x.ndim == 2 else y
