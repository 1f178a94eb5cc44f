"""The quantised base with its sites installed."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from adapters.geometry import Geometry, TaskType
from deployments.base import BaseName
from deployments.model.architectures import words
from deployments.model.attention import steady
from deployments.model.bank import Bank
from deployments.model.checkpoint import Checkpoint
from deployments.model.deltas import Deltas
from deployments.model.graphs import Captured, on_cuda
from deployments.model.heads import HeadGraph
from deployments.model.layout import Layout, find_layout, is_target
from deployments.model.quantize import Quantization, quantize
from deployments.model.ragged import install, ragged
from deployments.model.sites import EmbeddingSite, HeadSite, LinearSite, ShiftSite, Site
from deployments.model.unpadded import unpad


class Logits(NamedTuple):
    """What a batch gives, its rows split by task type; None where there are none.

    Attributes:
        sequences: [rows of sequences, most labels of them], fp32; zero beyond a row's own.
        tokens: [rows of tokens, tokens, most labels of them], fp32; likewise.
    """

    sequences: torch.Tensor | None
    tokens: torch.Tensor | None


class Encoder:
    """One base in evaluation mode, its linears quantised and its sites reading one bank."""

    def __init__(
        self,
        base: BaseName,
        *,
        quantization: Quantization,
        device: torch.device,
        dtype: torch.dtype,
        bank_bytes: int,
    ) -> None:
        """Load the base, quantise it, and put sites in the place of its modules.

        Args:
            base: Where it comes from.
            quantization: Of every linear that is not a head's.
            device: Where base and bank live.
            dtype: What base and LoRA compute in; heads compute in fp32.
            bank_bytes: Memory for resident adapters.

        Raises:
            BaseUnavailable: It cannot be had, or a head has parameters that no site holds.
        """
        self.base = base
        self.device = device
        checkpoint = Checkpoint.load(base, dtype)
        self.model = checkpoint.models["SEQ_CLS"]
        self.config = self.model.config
        self.config.use_cache = False
        self._prepare(device, dtype)
        layout = find_layout(checkpoint)
        lent = _lent(layout)
        heads = {path for head in layout.heads.values() for path in head}
        quantize(self.model, heads, quantization, device)
        width: int = self.config.get_text_config().hidden_size
        self.bank = Bank(bank_bytes, dtype, width, device)
        modules = {path: self.model.get_submodule(path) for path in layout.sites}
        # Also the embedding that is no site: an adapter may hold a copy of it.
        modules |= {path: self.model.get_submodule(path) for path in layout.embeddings}
        self.geometry = Geometry(
            base_id=base.hub_id,
            sites=layout.shapes(),
            graphs=layout.graphs,
            linears=layout.linears,
            embeddings=layout.embeddings,
            max_positions=self.max_positions,
        )
        self.deltas = Deltas(layout, modules, lent)
        self._graphs = self._build_graphs(checkpoint, layout)
        self._install(layout)
        nn.Module.to(self.model, device)
        self._captured = Captured(
            self.model.base_model, self.bank, self.pad_id or 0, self.max_positions
        )
        if device.type == "cuda":
            self._captured.record = on_cuda(device)

    def _prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        prepare = words(self.model).prepare
        if prepare is not None:
            prepare(self.model)
        self.is_ragged = device.type == "cpu" and install(self.model)
        if device.type != "cpu":
            unpad(self.model, device, dtype)
        elif not self.is_ragged:
            steady(self.model)

    def _build_graphs(self, checkpoint: Checkpoint, layout: Layout) -> dict[TaskType, HeadGraph]:
        """Put head sites into their places, and return the graph of each task type."""
        config = self.config.get_text_config()
        # No row has this id: without padding every token counts.
        pad_id = config.vocab_size if self.pad_id is None else self.pad_id
        for task_type, model in checkpoint.models.items():
            for path, name, module in layout.head_sites(task_type):
                inside = path.startswith(layout.prefix)
                # Nothing of the encoder reads what a pooler gives.
                within = inside and "pooler" not in path.split(".")
                site = HeadSite(module, name, self.bank, within=within)
                _replace(self.model if inside else model, path, site)
        return {t: HeadGraph(_headless(m), pad_id) for t, m in checkpoint.models.items()}

    def _install(self, layout: Layout) -> None:
        """Put the encoder's sites in the place of its modules."""
        for path, kind in layout.sites.items():
            module = self.model.get_submodule(path)
            if kind == "linear":
                site: Site = LinearSite(module, path, self.bank)
            elif kind == "embedding":
                site = EmbeddingSite(module, path, self.bank)
            else:
                rowless = is_target(path, words(self.model).rowless)
                site = ShiftSite(module, path, self.bank, rowless)
            _replace(self.model, path, site)

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        type_ids: torch.Tensor | None,
        slots: Sequence[int],
        of_tokens: Sequence[bool] = (),
    ) -> Logits:
        """Run one padded batch.

        Args:
            ids: [rows, tokens], int64, on the device, padded right.
            mask: [rows, tokens], int64, 1 for a token and 0 for padding.
            type_ids: [rows, tokens], int64, or None where all are 0.
            slots: [rows], the slot that answers each row.
            of_tokens: [rows], whether it answers each token; empty if none does.
        """
        segments = {} if type_ids is None else {"token_type_ids": type_ids}
        self.bank.route(slots)
        encoded = self._captured.run(ids, mask, type_ids)
        if encoded is None:
            with ragged(mask, self.bank.own()) if self.is_ragged else nullcontext():
                encoded = self.model.base_model(input_ids=ids, attention_mask=mask, **segments)
        if not any(of_tokens):
            return Logits(self._graphs["SEQ_CLS"](encoded, ids, mask), None)
        if all(of_tokens):
            return Logits(None, self._graphs["TOKEN_CLS"](encoded, ids, mask))
        parts = []
        for task_type, wanted in (("SEQ_CLS", False), ("TOKEN_CLS", True)):
            chosen = [row for row, is_token in enumerate(of_tokens) if is_token is wanted]
            self.bank.route([slots[row] for row in chosen])
            rows = torch.tensor(chosen, device=ids.device)
            parts.append(self._graphs[task_type](encoded, ids, mask, rows))  # type: ignore[index]
        return Logits(*parts)

    @cached_property
    def pad_id(self) -> int | None:
        """What rows are padded with, None if the base names none that its vocabulary has."""
        config = self.config.get_text_config()
        pad_id: int | None = config.pad_token_id
        return pad_id if pad_id is not None and 0 <= pad_id < config.vocab_size else None

    @cached_property
    def sha256(self) -> str | None:
        """SHA-256 of the base's model.safetensors, None for a base that has no such file."""
        path = cached_file(
            self.base.path,
            "model.safetensors",
            revision=self.base.revision,
            _raise_exceptions_for_missing_entries=False,
        )
        if path is None:
            return None
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def max_positions(self) -> int | None:
        """Longest input that the base can take in tokens, None if its positions have no end."""
        longest: int | None = getattr(self.config, "max_position_embeddings", None)
        for name, module in self.model.named_modules():
            # RoBERTa and its kin number positions from padding_idx + 1 on.
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                offset = 0 if module.padding_idx is None else module.padding_idx + 1
                longest = module.num_embeddings - offset
        return longest


def default_dtype(device: torch.device) -> torch.dtype:
    """Return what base and LoRA compute in: fp32 on a CPU, where bf16 is slower.

    On a GPU bf16, or fp16 if its hardware has no bf16 (before compute capability 8, where torch
    emulates it).
    """
    if device.type != "cuda":
        return torch.float32
    major, _ = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if major >= 8 else torch.float16


def _lent(layout: Layout) -> dict[str, torch.Tensor]:
    """Return parameter -> fp32 CPU tensor of every head module that the checkpoint brings."""
    return {
        f"{layout.head_name(task_type, path)}.{part}": parameter.detach().float()
        for task_type, head in layout.heads.items()
        for path, module in head.items()
        if layout.graphs[task_type].heads[path].in_base
        for part, parameter in module.named_parameters(recurse=False)
    }


def _headless(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model that shares all modules with another, but not the names it has for them."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.config = copy.deepcopy(model.config)
    return twin


def _replace(model: nn.Module, path: str, site: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, site)
