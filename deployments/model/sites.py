"""The modules that read the bank: linears, embeddings and norms of the base, and those of heads.

A site runs the base's own module for all rows of a batch, then goes through the rows whose adapters
change it: of a padded batch in runs of rows that are packed alike. What no row changes
costs nothing beyond the base's module.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from deployments.model.bank import Bank
from deployments.model.packing import Tensors
from deployments.model.ragged import packed

Changed = Sequence[tuple[slice, Tensors]]


class Site(nn.Module):
    """A module of the base, and where the bank has what adapters do to it."""

    def __init__(self, module: nn.Module, path: str, bank: Bank) -> None:
        """Wrap a module; `path` is its name in the bank."""
        super().__init__()
        self.module = module
        self.path = path
        self.bank = bank

    def _changed(self) -> Changed:
        """Return which rows of the batch change this module, with their own tensors.

        Of a padded batch those that lie together and are packed alike: what to index [rows, …]
        with, and tensors [rows, …]. Of a ragged one each by itself: what to index [tokens, …] with.
        """
        batch = packed()
        if batch is not None:
            return batch.changed(self.path)
        return [
            (run.rows, {name: self.bank.gather(run, part) for name, part in parts.items()})
            for run in self.bank.runs
            if (parts := run.sites.get(self.path))
        ]


class LinearSite(Site):
    """A linear of the base, plus what each row's own adapter adds to it.

    With x the input of a row, every letter but W and b the row's own, and what an adapter has not
    being zero:

        x' = x·(1 + scale_in)                                 IA3 before a feed-forward
        y  = (x'·W)·(1 + gain) + b + (x'·A)·B + shift         DoRA, LoRA, biases
        y' = y·(1 + scale_out)                                IA3 elsewhere

    or y = x·weight + bias where an adapter brings the module whole. LoRA's scaling and DoRA's gain
    are part of B. `lora` is [rank, in + out]: each rank's column of A beside its row of B.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [rows, tokens, in], or a pooled [rows, in], to the same with out; compute dtype.

        An input that all rows share, [1, tokens, in], is answered for each: [rows, tokens, out].
        """
        changed = self._changed()
        if not changed:
            y: torch.Tensor = self.module(x)
            return y
        if packed() is not None:
            return self._forward(x[0], changed).unsqueeze(0)
        if x.ndim == 2:
            return self._forward(x.unsqueeze(1), changed).squeeze(1)
        return self._forward(x, changed)

    def _forward(self, x: torch.Tensor, changed: Changed) -> torch.Tensor:
        """Map [rows, tokens, in], or [tokens of all rows, in] of a ragged batch."""
        num_rows = len(self.bank.rows)
        shared = x.ndim == 3 and len(x) == 1 < num_rows
        if any("scale_in" in own for _, own in changed):
            x, shared = (x.expand(num_rows, -1, -1) if shared else x).clone(), False
            for rows, own in changed:
                if "scale_in" in own:
                    x[rows] *= 1 + own["scale_in"].unsqueeze(-2)
        y: torch.Tensor = self.module(x)
        if torch.is_grad_enabled():
            y = y.clone()  # what a quantised product gives may not be changed in place then
        if shared:
            x, y = x.expand(num_rows, -1, -1), y.repeat(num_rows, 1, 1)
        for rows, own in changed:
            self._change(x[rows], y[rows], own)
        return y

    def _change(self, x: torch.Tensor, y: torch.Tensor, own: Tensors) -> None:
        """Change y in place: [rows of a run, tokens, out], or of one row [tokens, out]."""
        if x.ndim == 3 and len(x) == 1:
            pair = y.repeat(2, 1, 1)
            self._change(x.expand(2, -1, -1), pair, {n: _twice(t) for n, t in own.items()})
            y.copy_(pair[:1])
            return
        if "weight" in own:
            y.copy_(x @ own["weight"].mT)
            if "bias" in own:
                y += own["bias"].unsqueeze(-2)
            return
        if "gain" in own:
            bias = getattr(self.module, "bias", None)
            y += (y if bias is None else y - bias) * own["gain"].unsqueeze(-2)
        if "lora" in own:
            lora, width = own["lora"], x.shape[-1]
            add = y.addmm_ if y.ndim == 2 else y.baddbmm_
            add(x @ lora[..., :width].mT, lora[..., width:])
        if "shift" in own:
            y += own["shift"].unsqueeze(-2)
        if "scale_out" in own:
            y *= 1 + own["scale_out"].unsqueeze(-2)


class EmbeddingSite(Site):
    """An embedding of the base, plus each row's own: y = E[id] + A[slot, id]·B[slot]."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map ids, [rows, tokens] int64, to [rows, tokens, out]."""
        y: torch.Tensor = self.module(ids)
        for run in self.bank.runs:
            parts = run.sites.get(self.path)
            if parts:
                # Only the entries that are read: a row's whole A is as long as the vocabulary.
                a = self.bank.entries(run, parts["lora_A"], ids[run.rows])
                y[run.rows] += _product(a, self.bank.gather(run, parts["lora_B"]))
        return y


class ShiftSite(Site):
    """A module of which an adapter may change the bias, or if it is a norm bring all of it.

    y = module(x) + shift[slot], or norm(x)·weight[slot] + bias[slot].
    """

    def __init__(self, module: nn.Module, path: str, bank: Bank, rowless: bool) -> None:
        """Wrap a norm or a Conv1d.

        Args:
            module: The module.
            path: Its name in the bank.
            bank: What it reads.
            rowless: Whether its input, [tokens, in], is shared by all rows.
        """
        super().__init__(module, path, bank)
        self.rowless = rowless
        self.token_dim = 2 if isinstance(module, nn.Conv1d) else 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [rows, tokens, in], or a pooled [rows, in], to the same with out; compute dtype.

        A Conv1d has tokens last. A shared input gives [rows, tokens, out] if a row has a shift.
        """
        y: torch.Tensor = self.module(x)
        changed = self._changed()
        if not changed:
            return y
        ragged = packed() is not None
        if ragged:
            x, y = x[0], y[0]
        elif self.rowless:
            num_rows = len(self.bank.rows)
            x, y = x.expand(num_rows, *x.shape), y.repeat(num_rows, *[1] * y.ndim)
        plain = ragged or y.ndim == 2  # vectors are as they lie
        for rows, own in changed:
            vectors = own if plain else {n: v.unsqueeze(self.token_dim) for n, v in own.items()}
            if "weight" in own:
                y[rows] = _normed(self.module, x[rows]) * vectors["weight"]
            for name in {"shift", "bias"} & own.keys():
                y[rows] += vectors[name]
        return y.unsqueeze(0) if ragged else y


class HeadSite(nn.Module):
    """A linear or norm that every adapter brings whole: a row is answered by its own, in fp32.

    A linear gives x·W[slot]ᵀ + bias[slot], a norm norm(x)·weight[slot] + bias[slot]. In the bank
    it is [out, in + 1], a norm's [2, out]: weight and bias. Labels beyond a row's own are zero.
    """

    def __init__(self, module: nn.Module, name: str, bank: Bank, *, within: bool = False) -> None:
        """Take the place of a module, whose own weights are never used.

        Args:
            module: A linear or a norm.
            name: Its name in the bank.
            bank: Where the weights are.
            within: Whether the encoder goes on behind it, in the dtype of its input.
        """
        super().__init__()
        self.norm = module if isinstance(module, nn.LayerNorm) else None
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        self.width = len(weight)
        self.name = name
        self.bank = bank
        self.within = within

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [rows, in] or [rows, tokens, in], any float dtype, to the same with out, fp32.

        Within the encoder the result has the dtype of the input. A row whose adapter has no such
        module (a classifier of tokens has no pooler) gets zeros, which nobody reads.
        """
        batch = packed()
        if batch is not None:  # a module that the base has not, within its layers
            answer: torch.Tensor = batch.pack(self._forward(batch.pad(x)))
            return answer
        return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype if self.within else torch.float32
        rows = (x.unsqueeze(1) if x.ndim == 2 else x).float()
        found = list(self.bank.gather_head(self.name))
        if len(found) == 1 and len(found[0][0]) == len(rows):
            y = self._answer(rows, found[0][1])
        else:
            answers = [(at, self._answer(rows[at], own)) for at, own in found]
            width = max((part.shape[2] for _, part in answers), default=self.width)
            y = rows.new_zeros(*rows.shape[:2], width)
            for at, part in answers:
                y[at, :, : part.shape[2]] = part
        y = y.to(dtype)
        return y.squeeze(1) if x.ndim == 2 else y

    def _answer(self, x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        if self.norm is not None:
            return _normed(self.norm, x) * own[:, :1] + own[:, 1:]
        return _product(x, own[:, :, :-1].transpose(1, 2)) + own[:, :, -1].unsqueeze(1)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply [rows, tokens, in] by [rows, in, out]."""
    return (_twice(x) @ _twice(weight))[:1] if len(x) == 1 else x @ weight


def _twice(tensor: torch.Tensor) -> torch.Tensor:
    """Return one row's tensor, [1, …], as that of two rows.

    A batched product of one matrix takes another path than that of several, and gives other bits.
    int8 rounding would make a step of them, and an answer would depend on its neighbours.
    """
    return tensor.expand(2, *tensor.shape[1:])


def _normed(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Normalise as a LayerNorm does, without its weights."""
    assert isinstance(norm, nn.LayerNorm)
    return functional.layer_norm(x, norm.normalized_shape, eps=norm.eps)


def of_head(module: nn.Module, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a head module's weight and bias as its site reads them, fp32, CPU.

    A bias is always there: LoRA on a head may have one where the head has none.
    """
    weight = parts["weight"]
    bias = parts.get("bias")
    if bias is None:
        bias = torch.zeros(len(weight))
    if isinstance(module, nn.LayerNorm):
        return torch.stack([weight, bias])
    return torch.cat([weight, bias.unsqueeze(1)], dim=1)


def features(linear: nn.Module) -> tuple[int, int]:
    """Return the widths of a linear's input and output."""
    if isinstance(linear, nn.Linear):  # quantised ones subclass it too
        return linear.in_features, linear.out_features
    # transformers' Conv1D, a linear whose weight is [in, out].
    weight: torch.Tensor = linear.weight  # type: ignore[assignment]
    return weight.shape[0], weight.shape[1]
