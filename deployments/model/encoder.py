"""The quantised base with its sites installed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from functools import cached_property

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import cached_file, logging

from adapters.geometry import Geometry, SiteShape
from deployments.base import BaseName, BaseUnavailable
from deployments.model.attention import steady
from deployments.model.bank import Bank, Field
from deployments.model.quantize import Quantization, quantize
from deployments.model.sites import HeadSite, LoraSite


class Encoder:
    """One base in evaluation mode, its linears quantised and its sites reading one bank."""

    def __init__(
        self,
        base: BaseName,
        *,
        quantization: Quantization,
        device: torch.device,
        num_slots: int,
        max_rank: int,
        max_labels: int,
        lora_targets: Collection[str] | None,
    ) -> None:
        """Load the base, quantise it, and put sites in the place of its linears.

        Args:
            base: Where it comes from.
            quantization: Of every linear that is not the head's.
            device: Where base and bank live.
            num_slots: Rows of the bank, slot 0 included.
            max_rank: Largest LoRA rank of a slot.
            max_labels: Width of the logits.
            lora_targets: Ends of the module paths that get a LoRA site; None for all linears.

        Raises:
            BaseUnavailable: It cannot be had, or its head has parameters that no site holds.
        """
        self.base = base
        self.device = device
        self.dtype = compute_dtype(device)
        self.model, missing = _load(base, max_labels, device)
        self.config = self.model.config
        if self.config.pad_token_id is None:
            raise BaseUnavailable(f"base_model={str(base)!r} has no pad token, which batches need")
        linears = {n: m for n, m in self.model.named_modules() if type(m) is nn.Linear}
        head = head_paths(self.model, linears, missing)
        quantize(self.model, head, quantization, device)
        # Read again: quantising put other modules in the place of those above.
        linears = {path: _linear(self.model, path) for path in linears}
        targets = {
            path: linear
            for path, linear in linears.items()
            if path not in head and is_target(path, lora_targets)
        }
        fields: list[Field] = []
        for path, linear in targets.items():
            fields += LoraSite.fields(linear, path, self.dtype, max_rank)
        for path in head:
            fields += HeadSite.fields(linears[path], path)
        self.bank = Bank(fields, num_slots, device)
        sites = self._install(targets, {path: linears[path] for path in head}, max_rank)
        nn.Module.to(self.model, device)
        self.geometry = Geometry(
            architecture=type(self.model).__name__,
            base_id=base.hub_id,
            sites=sites,
            linears=frozenset(linears) - frozenset(head),
            max_rank=max_rank,
            max_labels=max_labels,
            max_positions=self.max_positions,
        )

    def _install(
        self, targets: dict[str, nn.Linear], head: dict[str, nn.Linear], max_rank: int
    ) -> dict[str, SiteShape]:
        """Put sites in the place of linears, and say which; the last of the head gives logits."""
        sites: dict[str, SiteShape] = {}
        for path, linear in targets.items():
            self._replace(path, LoraSite(linear, path, self.bank, self.dtype, max_rank))
            sites[path] = _shape("lora", linear)
        for path, linear in head.items():
            self._replace(path, HeadSite(linear, path, self.bank))
            sites[path] = _shape("head", linear, labelled=path == next(reversed(head)))
        return sites

    def _replace(self, path: str, site: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, site)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, type_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Run one padded batch, for the slots that `bank.route` was given.

        Args:
            ids: [rows, tokens], int64, on the device, padded right.
            mask: [rows, tokens], int64, 1 for a token and 0 for padding.
            type_ids: [rows, tokens], int64, or None where all are 0.

        Returns:
            Logits [rows, max_labels], fp32.
        """
        segments = {} if type_ids is None else {"token_type_ids": type_ids}
        logits: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, **segments).logits
        return logits

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


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return what base and LoRA compute in: bf16 on a GPU; fp32 on a CPU, where bf16 is slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def base_config(base: BaseName) -> object:
    """Return the base's transformers config without its weights.

    Raises:
        BaseUnavailable: It cannot be had.
    """
    try:
        return AutoConfig.from_pretrained(base.path, revision=base.revision)
    except (OSError, ValueError) as error:
        raise _unavailable(base, error) from None


def _load(
    base: BaseName, max_labels: int, device: torch.device
) -> tuple[PreTrainedModel, frozenset[str]]:
    """Load the base with a head of max_labels; also return the parameters it does not bring."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is what is meant here
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            base.path,
            revision=base.revision,
            num_labels=max_labels,
            dtype=compute_dtype(device),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError) as error:
        raise _unavailable(base, error) from None
    finally:
        logging.set_verbosity(verbosity)
    if device.type == "cpu":
        steady(model)
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    return model.eval().requires_grad_(False), frozenset(info["missing_keys"]) | mismatched


def _unavailable(base: BaseName, error: Exception) -> BaseUnavailable:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return BaseUnavailable(f"base_model={str(base)!r} cannot be loaded: {reason}")


def head_paths(
    model: PreTrainedModel, linears: Collection[str], missing: Collection[str]
) -> list[str]:
    """Return the linears that every adapter must bring, in the order of the model.

    They are those outside the base model proper (`classifier`), and those that the checkpoint does
    not bring (a pooler, say): both would else answer with random weights.
    """
    outside = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    head = [
        path
        for path in linears
        if path.split(".")[0] in outside
        or any(f"{path}.{leaf}" in missing for leaf in ("weight", "bias"))
    ]
    held = {f"{path}.{leaf}" for path in head for leaf in ("weight", "bias")}
    needed = {n for n, _ in model.named_parameters() if n.split(".")[0] in outside} | set(missing)
    left = sorted(needed - held)
    if left or not head:
        raise BaseUnavailable(
            f"{type(model).__name__} is not served yet: its head is not made of linears alone"
            + (f" ({', '.join(left[:4])})" if left else "")
        )
    return head


def is_target(path: str, targets: Collection[str] | None) -> bool:
    """Tell whether a module path ends in one of the targets; None is every path."""
    return targets is None or any(path == t or path.endswith("." + t) for t in targets)


def _linear(model: nn.Module, path: str) -> nn.Linear:
    module = model.get_submodule(path)
    assert isinstance(module, nn.Linear)  # quantised ones subclass it too
    return module


def _shape(kind: str, linear: nn.Linear, labelled: bool = False) -> SiteShape:
    return SiteShape(
        kind=kind,  # type: ignore[arg-type]
        in_features=linear.in_features,
        out_features=linear.out_features,
        bias=linear.bias is not None,
        labelled=labelled,
    )
