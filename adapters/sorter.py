"""Puts every stored tensor of an adapter to its module, and remembers what fits nowhere."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from adapters.geometry import Geometry, Graph, HeadShape
from adapters.spec import Spec

PREFIX = "base_model.model."
_SHOWN = 4  # names listed before "and N more": a wrong base leaves hundreds
# How PEFT names what it stores of a module, and what we call it.
_PARTS = (
    (".lora_A.weight", "lora_A"),
    (".lora_B.weight", "lora_B"),
    (".lora_B.bias", "lora_bias"),
    (".lora_embedding_A", "lora_A"),
    (".lora_embedding_B", "lora_B"),
    (".lora_magnitude_vector", "magnitude"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".ia3_l", "ia3"),
    (".base_layer.weight", "weight"),
    (".base_layer.bias", "bias"),
    (".weight", "weight"),
    (".bias", "bias"),
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SCALED = ("lora_B", "lora_bias")


@dataclass(slots=True)
class Sorter:
    """Takes tensors one by one, weights first; `finish` tells what is wrong.

    Attributes:
        spec: What the adapter says of itself.
        geometry: What the base offers.
        problems: Sentences; it adds its own.
        tensors: Module path + part -> tensor, as `Artifact.tensors`.
        copies: Parameter -> a tensor that must equal the base's own.
        num_labels: Rows of the head's last linear.
    """

    spec: Spec
    geometry: Geometry
    problems: list[str]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    copies: dict[str, torch.Tensor] = field(default_factory=dict)
    num_labels: int = 0
    _seen: set[str] = field(default_factory=set)  # right or wrong, so that none is called missing
    _unmatched: list[str] = field(default_factory=list)
    _misshapen: list[str] = field(default_factory=list)
    _doubles: dict[str, torch.Tensor] = field(default_factory=dict)

    def place(self, name: str, tensor: torch.Tensor) -> None:
        """Take one stored tensor."""
        # PEFT's bias="all" also stores the head that training began with, and the head twice.
        if ".original_module." in name:
            return
        if ".modules_to_save." in name:
            self._doubles[name] = tensor
            return
        path, part = _split(name)
        want = self._shape(path, part, tensor) if part else None
        if want is None or f"{path}.{part}" in self._seen:  # `x.base_layer.bias` beside `x.bias`
            self._unmatched.append(name)
            return
        self._seen.add(f"{path}.{part}")
        if tensor.dtype not in _FLOATS:
            self.problems.append(f"{name} has dtype {tensor.dtype}, not a float")
        elif not want:
            return  # said already
        elif tuple(tensor.shape) != want:
            self._misshapen.append(f"{name} is {list(tensor.shape)}, not {list(want)}")
        else:
            read = self._as_read(path, part, tensor.float())
            # As it will be read: fp64, or a scaling, may hold more than fp32 can.
            if not torch.isfinite(read).all():
                self.problems.append(f"{name} holds NaN or infinite values")
            elif part == "weight" and path in self.geometry.embeddings:
                self.copies[f"{path}.weight"] = read
            else:
                self.tensors[f"{path}.{part}"] = read

    @property
    def graph(self) -> Graph:
        """How the adapter's task type is answered."""
        return self.geometry.graphs[self.spec.task_type]

    def _as_read(self, path: str, part: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor as its site reads it, with the scaling in LoRA's B."""
        # Folding the scaling into B once spares a multiplication a row, a site and a batch.
        if part in _SCALED:
            tensor = tensor * self.spec.scaling_of(path)
        if part == "lora_B" or (part == "lora_A" and path in self.geometry.embeddings):
            return tensor.t()
        return tensor.flatten() if part == "ia3" else tensor

    def _shape(self, path: str, part: str, tensor: torch.Tensor) -> tuple[int, ...] | None:
        """Return the shape that a part must have as PEFT stores it, None where none may be."""
        head = self.graph.heads.get(path)
        if head is not None and part in ("weight", "bias"):
            return self._head_shape(head, part, tensor)
        site = self.geometry.sites.get(path)
        if part in ("weight", "bias") and self._brings(path):
            if site is None or not site.whole:
                return self._refuse(
                    f"{path} is brought whole, as only linears and LayerNorms can be"
                )
            return site.whole.get(part)
        if part == "weight":
            # PEFT saves whole embeddings too, where it takes them for resized or trained.
            return tuple(tensor.shape) if path in self.geometry.embeddings else None
        if part == "bias":
            named = site is not None and site.bias and self._promises_bias(path)
            return (site.out_features,) if site is not None and named else None
        if not self._targeted(path):
            return None
        if head is not None:
            rows, width = self._head_rows(head), head.parameters["weight"][-1]
            return _stored_shape(part, self.spec, path, width, rows)
        assert site is not None
        if site.kind == "embedding" and self.spec.method != "lora":
            return self._refuse(f"{path} is an embedding, on which only LoRA is served")
        return _stored_shape(part, self.spec, path, site.in_features, site.out_features)

    def _brings(self, path: str) -> bool:
        """Tell whether the adapter was trained with a module before its head replaced."""
        known = {linear.partition(".")[0] for linear in self.geometry.linears}
        inside = path.partition(".")[0] in known and path not in self.geometry.embeddings
        return inside and self.spec.matching.saves(path)

    def _refuse(self, problem: str) -> tuple[int, ...]:
        if problem not in self.problems:
            self.problems.append(problem)
        return ()

    def _targeted(self, path: str) -> bool:
        """Tell whether the adapter has LoRA or a vector on a module that this base has."""
        known = path in self.geometry.linears or path in self.geometry.embeddings
        if path in self.graph.absent or not (known or path in self.graph.heads):
            return False
        if self.spec.matching.target_modules == "all-linear" and path not in self.geometry.linears:
            return False
        return self.spec.matching.targets(path)

    def _targetable(self) -> list[str]:
        return [*self.geometry.linears, *self.geometry.embeddings, *self.graph.heads]

    def _promises_bias(self, path: str) -> bool:
        lora = self.spec.bias == "lora_only" and self._targeted(path)
        return lora or (self.spec.bias == "all" and path not in self.graph.absent)

    def _head_shape(
        self, head: HeadShape, part: str, tensor: torch.Tensor
    ) -> tuple[int, ...] | None:
        """Return the shape that a head's weight or bias must have, or None if it has no such."""
        want = head.parameters.get(part)
        if want is None or not head.labelled:
            return want
        # The weight, which comes first, has the say on the number of labels.
        if not self.num_labels and tensor.ndim == len(want):
            self.num_labels = tensor.shape[0]
        return (self.num_labels or want[0], *want[1:])

    def _head_rows(self, head: HeadShape) -> int:
        return (head.labelled and self.num_labels) or head.parameters["weight"][0]

    def finish(self) -> None:
        """Say what is missing and what matched nothing."""
        for path, head in self.graph.heads.items():
            brought = f"{path}.weight" in self._seen
            if head.labelled and not brought and head.in_base:
                self.num_labels = head.parameters["weight"][0]
        self._compare_doubles()
        if not any(map(self._targeted, self._targetable())):
            self.problems.append("target_modules matches no module of this base")
        if self._unmatched:
            self.problems.append(f"tensors that match nothing here: {shorten(self._unmatched)}")
        if self._misshapen:
            self.problems.append(shorten(self._misshapen))
        head_names = self._missing_of_head()
        if head_names:
            self.problems.append(f"it has no head weights: {shorten(head_names)} missing")
        parts = self._missing_parts()
        if parts:
            self.problems.append(
                f"promised by {self._promise(parts)} but missing: {shorten(parts)}"
            )

    def _compare_doubles(self) -> None:
        for name, tensor in self._doubles.items():
            # Of a module in parts it also names the adapter: `modules_to_save.default.dense`.
            names = [re.sub(r"\.modules_to_save(\.[^.]+)?\.", ".", name)]
            names.append(name.replace(".modules_to_save.", "."))
            found = (self.tensors.get(".".join(_split(plain))) for plain in names)
            kept = next((tensor for tensor in found if tensor is not None), None)
            if kept is None or kept.shape != tensor.shape or not kept.equal(tensor.float()):
                self._unmatched.append(name)

    def _missing_of_head(self) -> list[str]:
        """Return what the adapter neither brings nor may take from the base."""
        missing = []
        for path, head in self.graph.heads.items():
            lent = head.in_base and not self.spec.matching.saves(path)
            names = [f"{path}.{part}" for part in head.parameters]
            missing += [name for name in names if name not in self._seen and not lent]
        return missing

    def _missing_parts(self) -> list[str]:
        """Return what the spec promises of the encoder and the file has not."""
        promised = []
        for path in sorted(filter(self._targeted, self._targetable())):
            promised += [f"{path}.{part}" for part in _promised(self.spec)]
        for path, site in self.geometry.sites.items():
            if site.bias and self._promises_bias(path):
                promised.append(f"{path}.bias")
            if site.whole and path not in self.graph.absent and self._brings(path):
                promised += [f"{path}.{part}" for part in site.whole]
        return [name for name in promised if name not in self._seen]

    def _promise(self, names: list[str]) -> str:
        """Return the key of the config that promised what is missing."""
        if all(self._brings(name.rpartition(".")[0]) for name in names):
            return "modules_to_save"
        return "bias" if all(name.endswith(".bias") for name in names) else "target_modules"


def _split(name: str) -> tuple[str, str]:
    """Return a stored name's module path and part; the part is empty if it is none of ours."""
    if name.startswith(PREFIX):
        for ending, part in _PARTS:
            if name.endswith(ending):
                return name.removeprefix(PREFIX).removesuffix(ending), part
    return name, ""


def _stored_shape(
    part: str, spec: Spec, path: str, width: int, rows: int
) -> tuple[int, ...] | None:
    """Return the shape of a part as PEFT stores it for a module of `width` -> `rows`."""
    if spec.method == "ia3":
        forward = spec.matching.feeds_forward(path)
        return ((1, width) if forward else (rows, 1)) if part == "ia3" else None
    shapes = {"lora_A": (spec.rank_of(path), width), "lora_B": (rows, spec.rank_of(path))}
    vectors = {"lora_bias": spec.lora_bias, "magnitude": spec.method == "dora"}
    return (rows,) if vectors.get(part) else shapes.get(part)


def _promised(spec: Spec) -> list[str]:
    if spec.method == "ia3":
        return ["ia3"]
    more = {"lora_bias": spec.lora_bias, "magnitude": spec.method == "dora"}
    return ["lora_A", "lora_B", *(part for part, promised in more.items() if promised)]


def shorten(names: list[str]) -> str:
    """Join names, the first few of many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
