"""The modules that read the bank: linears and embeddings with LoRA, biases, and those of heads."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from deployments.model.bank import Bank, Field


class LinearSite(nn.Module):
    """A linear of the base, plus what each row's own adapter adds to it.

    With x the input of a row, every letter but W and b the row's own, and what an adapter has not
    being zero:

        x' = x·(1 + scale_in)                                 IA3 before a feed-forward
        y  = (x'·W)·(1 + gain) + b + (x'·A)·B + shift         DoRA, LoRA, biases
        y' = y·(1 + scale_out)                                IA3 elsewhere

    LoRA's scaling and DoRA's gain are part of B.
    """

    def __init__(
        self, linear: nn.Module, path: str, bank: Bank, dtype: torch.dtype, max_rank: int
    ) -> None:
        """Wrap a linear; its fields must be in the bank (see `fields`)."""
        super().__init__()
        self.linear = linear
        self.bank = bank
        fields = self.fields(linear, path, dtype, max_rank)
        self.names = frozenset(field.name for field in fields)
        self.lora = fields[0].name
        self.a, self.b = (bank.view(field.name) for field in fields[:2])  # [slots, in, max_rank] …
        self.vectors = {
            field.name.rpartition(".")[2]: (field.name, bank.view(field.name))  # [slots, in or out]
            for field in fields[2:]
        }

    @staticmethod
    def fields(
        linear: nn.Module, path: str, dtype: torch.dtype, max_rank: int
    ) -> tuple[Field, ...]:
        """Return what a site of this linear takes of a bank row."""
        width, rows = features(linear)
        shapes = {
            "lora_A": (width, max_rank),
            "lora_B": (max_rank, rows),
            "scale_in": (width,),
            "gain": (rows,),
            "shift": (rows,),
            "scale_out": (rows,),
        }
        return tuple(Field(f"{path}.{part}", shape, dtype) for part, shape in shapes.items())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [rows, tokens, in], or a pooled [rows, in], to the same with out; compute dtype.

        An input that all rows share, [1, tokens, in], is answered for each: [rows, tokens, out].
        """
        used = self.bank.batch.fields
        if self.names.isdisjoint(used):
            y: torch.Tensor = self.linear(x)
            return y
        num_rows = len(self.bank.batch.slots)
        pooled = x.ndim == 2
        if self.vectors["scale_in"][0] in used:
            scale = 1 + self._vector("scale_in")
            x = x * (scale.squeeze(1) if pooled else scale)
        y = self.linear(x)
        if pooled:
            x, y = x.unsqueeze(1), y.unsqueeze(1)
        if len(x) == 1 < num_rows:
            x, y = x.expand(num_rows, -1, -1), y.expand(num_rows, -1, -1)
        if self.vectors["gain"][0] in used:
            bias = getattr(self.linear, "bias", None)
            y = y + (y if bias is None else y - bias) * self._vector("gain")
        if self.lora in used:
            y = torch.baddbmm(y, x @ self.bank.gather(self.a), self.bank.gather(self.b))
        if self.vectors["shift"][0] in used:
            y = y + self._vector("shift")
        if self.vectors["scale_out"][0] in used:
            y = y * (1 + self._vector("scale_out"))
        return y.squeeze(1) if pooled else y

    def _vector(self, part: str) -> torch.Tensor:
        """Return each row's own, [rows, 1, features]."""
        return self.bank.gather(self.vectors[part][1]).unsqueeze(1)


class EmbeddingSite(nn.Module):
    """An embedding of the base, plus each row's own: y = E[id] + A[slot, id]·B[slot]."""

    def __init__(
        self, embedding: nn.Embedding, path: str, bank: Bank, dtype: torch.dtype, max_rank: int
    ) -> None:
        """Wrap an embedding; its fields must be in the bank (see `fields`)."""
        super().__init__()
        self.embedding = embedding
        self.bank = bank
        field_a, field_b = self.fields(embedding, path, dtype, max_rank)
        self.name = field_a.name
        self.a = bank.view(field_a.name)  # [slots, entries, max_rank]
        self.b = bank.view(field_b.name)  # [slots, max_rank, out]

    @staticmethod
    def fields(
        embedding: nn.Embedding, path: str, dtype: torch.dtype, max_rank: int
    ) -> tuple[Field, ...]:
        """Return what a site of this embedding takes of a bank row."""
        return (
            Field(f"{path}.lora_A", (embedding.num_embeddings, max_rank), dtype),
            Field(f"{path}.lora_B", (max_rank, embedding.embedding_dim), dtype),
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map ids, [rows, tokens] int64, to [rows, tokens, out]."""
        y: torch.Tensor = self.embedding(ids)
        if self.name not in self.bank.batch.fields:
            return y
        # Only the entries that are read: a row's whole A is as long as the vocabulary.
        a = self.a[self.bank.batch.slots.unsqueeze(1), ids]
        return torch.baddbmm(y, a, self.bank.gather(self.b))


class ShiftSite(nn.Module):
    """A module whose bias alone an adapter may change, a norm: y = module(x) + shift[slot]."""

    def __init__(
        self, module: nn.Module, path: str, bank: Bank, dtype: torch.dtype, rowless: bool
    ) -> None:
        """Wrap a module with a bias; its field must be in the bank (see `fields`).

        Args:
            module: A linear, a norm or a Conv1d.
            path: Its path.
            bank: Where the shifts are.
            dtype: Of the shifts.
            rowless: Whether its input, [tokens, in], is shared by all rows.
        """
        super().__init__()
        self.module = module
        self.bank = bank
        self.rowless = rowless
        self.token_dim = 2 if isinstance(module, nn.Conv1d) else 1
        (field,) = self.fields(module, path, dtype)
        self.name = field.name
        self.shift = bank.view(field.name)  # [slots, out]

    @staticmethod
    def fields(module: nn.Module, path: str, dtype: torch.dtype) -> tuple[Field, ...]:
        """Return what a site of this module takes of a bank row."""
        return (Field(f"{path}.shift", tuple(module.bias.shape), dtype),)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [rows, tokens, in], or a pooled [rows, in], to the same with out; compute dtype.

        A Conv1d has tokens last. A shared input gives [rows, tokens, out] if a row has a shift.
        """
        y: torch.Tensor = self.module(x)
        if self.name not in self.bank.batch.fields:
            return y
        shift = self.bank.gather(self.shift)
        pooled = y.ndim == 2 and not self.rowless
        return y + (shift if pooled else shift.unsqueeze(self.token_dim))


class HeadSite(nn.Module):
    """A linear or norm that every adapter brings whole: a row is answered by its own, in fp32.

    A linear gives x·W[slot]ᵀ + bias[slot], a norm norm(x)·weight[slot] + bias[slot]. Rows of W
    beyond an adapter's labels are zero.
    """

    def __init__(
        self,
        module: nn.Module,
        prefix: str,
        bank: Bank,
        max_labels: int | None,
        *,
        within: bool = False,
    ) -> None:
        """Take the place of a module, whose own weights are never used.

        Args:
            module: A linear or a norm.
            prefix: Its name in the bank.
            bank: Where the weights are.
            max_labels: Width of the last linear, None for all others.
            within: Whether the encoder goes on behind it, in the dtype of its input.
        """
        super().__init__()
        self.bank = bank
        self.within = within
        self.norm = module if isinstance(module, nn.LayerNorm) else None
        weight, bias = self.fields(module, prefix, max_labels)
        self.weight = bank.view(weight.name)  # [slots, out, in], of a norm [slots, out]
        self.bias = bank.view(bias.name)  # [slots, out]

    @staticmethod
    def fields(module: nn.Module, prefix: str, max_labels: int | None) -> tuple[Field, ...]:
        """Return what a site takes of a bank row; `max_labels` is the last linear's width.

        A bias is always there: LoRA on a head may have one where the head has none.
        """
        shape: torch.Size = module.weight.shape  # type: ignore[assignment]
        rows = max_labels or shape[0]
        return (
            Field(f"{prefix}.weight", (rows, *shape[1:]), torch.float32),
            Field(f"{prefix}.bias", (rows,), torch.float32),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [rows, in] or [rows, tokens, in], any float dtype, to the same with out, fp32.

        Within the encoder the result has the dtype of the input.
        """
        dtype = x.dtype if self.within else torch.float32
        x = x.float()
        rows = x.unsqueeze(1) if x.ndim == 2 else x
        weight = self.bank.gather(self.weight)
        if self.norm is None:
            y = rows @ weight.transpose(1, 2)
        else:
            shape, eps = self.norm.normalized_shape, self.norm.eps
            y = functional.layer_norm(rows, shape, eps=eps) * weight.unsqueeze(1)
        y = (y + self.bank.gather(self.bias).unsqueeze(1)).to(dtype)
        return y.squeeze(1) if x.ndim == 2 else y


def features(linear: nn.Module) -> tuple[int, int]:
    """Return the widths of a linear's input and output."""
    if isinstance(linear, nn.Linear):  # quantised ones subclass it too
        return linear.in_features, linear.out_features
    # transformers' Conv1D, a linear whose weight is [in, out].
    weight: torch.Tensor = linear.weight  # type: ignore[assignment]
    return weight.shape[0], weight.shape[1]
