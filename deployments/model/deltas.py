"""An adapter against its base: what it brings, turned into what the sites read.

Only here are the base's own values needed: for DoRA's norms, for a bias in the place of the
base's, for LoRA on a head, and for a head that the base lends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters.artifact import Artifact
from adapters.errors import AdapterRefused
from deployments.model.layout import Layout
from deployments.model.sites import of_head

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter changes, as fp32 CPU tensors.

    Attributes:
        body: Module path in the encoder -> what its site reads, see `deployments.model.sites`.
        heads: Head module -> what its site reads.
    """

    body: dict[str, Tensors]
    heads: Tensors


class Deltas:
    """Turns artifacts into deltas. Reads the base's weights and changes nothing."""

    def __init__(self, layout: Layout, modules: Mapping[str, nn.Module], lent: Tensors) -> None:
        """Keep the base's own.

        Args:
            layout: What became of the base's modules.
            modules: Module path -> the module inside each site, quantised as it is.
            lent: Parameter -> the head that the base's checkpoint brings, fp32, CPU.
        """
        self.layout = layout
        self.modules = modules
        self.lent = lent

    def of(self, artifact: Artifact) -> Delta:
        """Return what an adapter changes.

        Raises:
            AdapterRefused: It has a copy of a base's parameter that differs from the base's.
        """
        problems = [
            problem
            for name, tensor in artifact.copies.items()
            if (problem := self._copy_problem(name, tensor))
        ]
        if problems:
            raise AdapterRefused(artifact.task, problems)
        body: dict[str, Tensors] = {}
        for path, kind in self.layout.sites.items():
            parts = _parts(artifact.tensors, path)
            if parts and kind == "embedding":
                scale = getattr(self.modules[path], "embed_scale", 1.0)
                body[path] = {"lora_A": parts["lora_A"], "lora_B": parts["lora_B"] * float(scale)}
            elif "weight" in parts:
                body[path] = parts
            elif parts:
                body[path] = self._of_linear(artifact, path, parts)
        return Delta(
            {path: named for path, named in body.items() if named}, self._of_head(artifact)
        )

    def _of_linear(self, artifact: Artifact, path: str, parts: Tensors) -> Tensors:
        """Return the parts of `LinearSite`, or the shift alone of another module."""
        named: Tensors = {}
        shift = parts.get("lora_bias")
        if "lora_A" in parts:
            a, b = parts["lora_A"], parts["lora_B"]
            if "magnitude" in parts:
                gain = parts["magnitude"] / _norms(self._weight(path), a, b)
                named["gain"], b = gain - 1, b * gain
            named["lora"] = torch.cat([a, b], dim=1)
        if "ia3" in parts:
            forward = artifact.spec.matching.feeds_forward(path)
            named["scale_in" if forward else "scale_out"] = parts["ia3"] - 1
        if "bias" in parts:
            own: torch.Tensor = self.modules[path].bias  # type: ignore[assignment]
            moved = parts["bias"] - own.detach().float().cpu()
            shift = moved if shift is None else shift + moved
        # bias="all" stores every bias of the base, and few of them have moved.
        if shift is not None and shift.any():
            named["shift"] = shift
        return named

    def _of_head(self, artifact: Artifact) -> Tensors:
        """Return the head's weights: the adapter's, else the base's, with LoRA on them merged."""
        task_type, heads = artifact.spec.task_type, {}
        shapes = self.layout.graphs[task_type].heads
        for path, name, module in self.layout.head_sites(task_type):
            parts = _parts(artifact.tensors, path)
            for part in shapes[path].parameters:
                if part not in parts:
                    parts[part] = self.lent[f"{name}.{part}"]
            heads[name] = of_head(module, _merged(artifact, path, parts))
        return heads

    def _weight(self, path: str) -> torch.Tensor:
        """Return a linear's weight as its product sees it, [out, in], fp32, CPU."""
        module = self.modules[path]
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            # Imported here: PEFT brings bitsandbytes, which looks for GPUs.
            from peft.utils.integrations import dequantize_module_weight

            return dequantize_module_weight(module).detach().float().cpu()
        weight: torch.Tensor = module.weight.detach().float().cpu()  # type: ignore[operator]
        return weight.t() if isinstance(module, Conv1D) else weight

    def _copy_problem(self, name: str, tensor: torch.Tensor) -> str | None:
        """Say why a stored parameter is not the base's own, or None if it is."""
        own: torch.Tensor = self.modules[name.removesuffix(".weight")].weight  # type: ignore[assignment]
        if own.shape != tensor.shape:
            return f"its embedding was resized to {len(tensor)} tokens, the base has {len(own)}"
        if not own.detach().cpu().equal(tensor.to(own.dtype)):
            return f"{name} is not the base's: whole embeddings are not served"
        return None


def _parts(tensors: Mapping[str, torch.Tensor], path: str) -> Tensors:
    names = ("lora_A", "lora_B", "lora_bias", "magnitude", "ia3", "weight", "bias")
    return {part: tensors[f"{path}.{part}"] for part in names if f"{path}.{part}" in tensors}


def _norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the norm of each output's merged weights, [out] (DoRA, arXiv:2402.09353, eq. 5)."""
    norms: torch.Tensor = torch.linalg.vector_norm(weight + b.t() @ a, dim=1)
    return norms


def _merged(artifact: Artifact, path: str, parts: Tensors) -> Tensors:
    """Return a head module's weights with what the adapter has on them, which is plain algebra."""
    weight, bias = parts["weight"], parts.get("bias")
    if "lora_A" in parts:
        a, b = parts["lora_A"], parts["lora_B"]
        merged = weight + b.t() @ a
        if "magnitude" in parts:
            merged = merged * (parts["magnitude"] / _norms(weight, a, b)).unsqueeze(1)
        weight = merged
        if "lora_bias" in parts:
            bias = parts["lora_bias"] if bias is None else bias + parts["lora_bias"]
    if "ia3" in parts and artifact.spec.matching.feeds_forward(path):
        weight = weight * parts["ia3"]
    elif "ia3" in parts:
        weight = weight * parts["ia3"].unsqueeze(1)
        bias = None if bias is None else bias * parts["ia3"]
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
