"""Layers that see no padding (CPU): the rows of a batch lie behind one another: docs/adr/0012.

Texts of one batch differ in length by far, and few wait at a time, so a padded batch is either
small or mostly padding. Between the first layer of a base and its last all rows are one row of
tokens, [1, tokens of all rows, …]: what works token by token need not know, attention goes row by
row, and sites change each row's part. Before and behind, embeddings and heads have padded rows as
transformers means them.

What is computed by row has that row's own shape, and int8 products are exact: so in int8 no layer
gives a row other numbers beside other rows. In fp32 a product of more tokens may round otherwise.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from deployments.model.packing import Own, Tensors

logger = logging.getLogger("ray.serve")

_NAME = "onebase_ragged"
_TRIED = (1, 24, 7, 7, 12)  # lengths in tokens
# oneDNN makes a kernel for each number of tokens, in 0.6 ms, and keeps a few (`allocator.py`). Few
# tokens are rounded to finer steps: of a row alone the coarse ones would be a tenth of its forward.
_STEP, _FINE_STEP, _FEW = 16, 4, 64


@dataclass(slots=True)
class Ragged:
    """A batch while its layers run.

    Attributes:
        shape: Rows and tokens, with padding.
        num_tokens: Of all rows, without.
        real: int64, where tokens are among all of `shape`, and the first one a few times more, up
            to the next step.
        spans: Where each row's tokens lie, once they lie behind one another.
        own: Of each row, what its adapter changes.
        packed: Whether they do now.
    """

    shape: tuple[int, int]
    num_tokens: int
    real: torch.Tensor
    spans: Sequence[slice]
    own: Sequence[Own]
    packed: bool = False

    def changed(self, path: str) -> list[tuple[slice, Tensors]]:
        """Return the rows whose adapters change a module, each with its own tensors."""
        pairs = zip(self.spans, self.own, strict=True)
        return [(span, parts) for span, own in pairs if (parts := own.get(path))]

    def pack(self, given: Any) -> Any:
        """Put rows behind one another, in tensors [rows or 1, tokens, …] and tuples of such."""
        if isinstance(given, tuple):
            return tuple(self.pack(part) for part in given)
        # Of more dimensions are masks.
        if not torch.is_tensor(given) or given.ndim not in (2, 3):
            return given
        if given.shape[1] != self.shape[1] or len(given) not in (1, self.shape[0]):
            return given
        rows = given.expand(self.shape[0], *given.shape[1:])
        return rows.flatten(0, 1).index_select(0, self.real).unsqueeze(0)

    def pad(self, given: Any) -> Any:
        """Undo `pack` in what a layer gives; padding is zero."""
        if isinstance(given, tuple):
            return tuple(self.pad(part) for part in given)
        if not torch.is_tensor(given) or given.shape[:2] != (1, len(self.real)):
            return given
        padded = given.new_zeros(self.shape[0] * self.shape[1], *given.shape[2:])
        once = slice(self.num_tokens)
        return padded.index_copy(0, self.real[once], given[0, once]).unflatten(0, self.shape)


_running: ContextVar[Ragged | None] = ContextVar("ragged", default=None)


def packed() -> Ragged | None:
    """Return the batch whose rows lie behind one another now, None if they are padded."""
    batch = _running.get()
    return batch if batch is not None and batch.packed else None


@contextmanager
def ragged(mask: torch.Tensor, own: Sequence[Own]) -> Iterator[None]:
    """Let the layers of a model that `installed` it run without padding.

    Args:
        mask: [rows, tokens], 1 for a token and 0 for padding, which is on the right.
        own: What each row's adapter changes.
    """
    ends = itertools.accumulate(mask.sum(1).tolist(), initial=0)
    spans = [slice(start, stop) for start, stop in itertools.pairwise(ends)]
    real = mask.flatten().nonzero().squeeze(1)
    num_tokens = len(real)
    real = functional.pad(real, (0, -num_tokens % (_FINE_STEP if num_tokens <= _FEW else _STEP)))
    batch = Ragged((len(mask), mask.shape[1]), num_tokens, real, spans, own)
    # Padded by no longest row, but to a width that was asked for: what is packed looks padded then.
    is_like_packed = mask.shape[1] == len(real) and len(mask) > 1
    token = _running.set(None if is_like_packed else batch)
    try:
        yield
    finally:
        _running.reset(token)


def install(model: PreTrainedModel) -> bool:
    """Make a model's layers run without padding within `ragged`; tell whether they can.

    A model that brings its own attention (DeBERTa, MPNet), or to which the order of layers is not
    all, is left as it is.

    Args:
        model: The base, on the CPU, not quantised and without sites.
    """
    layers = [m for m in model.base_model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not model._supports_attention_backend or not layers:
        return False
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, _mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    hooks = [layer.register_forward_pre_hook(_enter, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(_leave))
    fault = _fault(model)
    if fault is not None:
        logger.warning("layers run over padding too: %s", fault)
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    return fault is None


def _enter(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    batch = _running.get()
    if batch is None:
        return None
    packed = batch.pack(args), {name: batch.pack(given) for name, given in kwargs.items()}
    batch.packed = True
    return packed


def _leave(_: nn.Module, args: Any, output: Any) -> Any:
    batch = _running.get()
    if batch is None:
        return output
    batch.packed = False
    return batch.pad(output)


def _fault(model: PreTrainedModel) -> str | None:
    """Return where packed rows differ from padded ones by more than rounding, None if nowhere."""
    encoder, num_ids = model.base_model, model.config.get_text_config().vocab_size
    dice = torch.Generator().manual_seed(0)
    shape = (len(_TRIED), max(_TRIED))
    ids = torch.randint(min(5, num_ids - 1), num_ids, shape, generator=dice)
    mask = (torch.arange(shape[1]) < torch.tensor(_TRIED).unsqueeze(1)).long()
    real = mask.bool()
    try:
        with torch.inference_mode():
            want = encoder(input_ids=ids, attention_mask=mask)[0][real]
            with ragged(mask, [{}] * len(_TRIED)):
                got = encoder(input_ids=ids, attention_mask=mask)[0][real]
    except Exception as error:
        return repr(error)
    off_by = float((got.float() - want.float()).abs().max())
    # What adds up over the layers is far less, and a row that sees another's tokens is off by far.
    if not off_by <= torch.finfo(want.dtype).eps ** 0.5 * float(want.abs().max()):
        return f"packed rows are off by {off_by:.2g}"
    return None


def _mask(**kwargs: Any) -> torch.Tensor | None:
    """Return transformers' mask, [rows, 1, queries, keys]; of a ragged batch for a row alone."""
    if _running.get() is not None:
        kwargs |= {"batch_size": 1, "attention_mask": None}
    mask: torch.Tensor | None = sdpa_mask(**kwargs)
    return mask


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as `sdpa` does, [rows, heads, tokens, size] each; of a ragged batch row by row.

    Rows of one length at a time would take as long: the kernel goes head by head.
    """
    answer: tuple[torch.Tensor, None]
    batch = packed()
    if batch is None:
        answer = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return answer
    lengths = [span.stop - span.start for span in batch.spans]
    qkv = (part[:, :, : batch.num_tokens] for part in (query, key, value))
    rows = zip(*(part.split(lengths, dim=2) for part in qkv), strict=True)
    parts = []
    for length, (q, k, v) in zip(lengths, rows, strict=True):
        mask = None if attention_mask is None else attention_mask[:, :, :length, :length]
        parts.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    rest = query.shape[2] - batch.num_tokens
    parts.append(parts[0].new_zeros(1, rest, *parts[0].shape[2:]))
    return torch.cat(parts, dim=1), None
