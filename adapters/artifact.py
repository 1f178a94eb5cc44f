"""A spec and its host tensors, every one of them accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import safetensors
import torch
from safetensors.torch import load as load_safetensors

from adapters.errors import AdapterRefused
from adapters.geometry import Geometry, hub_id
from adapters.pattern import PatternTooSlow
from adapters.rules import ProblemType, Rules
from adapters.spec import Spec, read_spec
from adapters.store import WEIGHTS, Files
from adapters.tokenizer import Comparison

_PREFIX = "base_model.model."
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN = 4  # names listed before "and N more": a wrong base leaves hundreds


@dataclass(frozen=True, slots=True)
class Artifact:
    """An adapter, validated against a base and ready to be written into a slot.

    Attributes:
        task: The task it was read for.
        version: 8 hex digits, see `adapters.store.Files`.
        spec: What its config says.
        rules: What its task.json says.
        num_labels: Rows of its last head linear.
        num_bytes: Size of its tensors as they lie in the file.
        training_length: Longest input in training in tokens, if its tokenizer files tell.
        tensors: Bank field -> fp32 CPU tensor. For a LoRA site `path.lora_A` [in, rank] and
            `path.lora_B` [rank, out], which has the scaling folded in; for a head site
            `path.weight` [out, in] and `path.bias` [out].
    """

    task: str
    version: str
    spec: Spec
    rules: Rules
    num_labels: int
    num_bytes: int
    training_length: int | None
    tensors: Mapping[str, torch.Tensor]

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names by index: the rules', else config.json's, else LABEL_0…."""
        named = self.rules.labels or self.spec.labels
        return named or tuple(f"LABEL_{index}" for index in range(self.num_labels))

    @property
    def problem_type(self) -> ProblemType:
        """The rules', else config.json's, else transformers' guess from the number of labels."""
        named = self.rules.problem_type or self.spec.problem_type
        return named or ("regression" if self.num_labels == 1 else "single_label_classification")

    def without_tensors(self) -> Artifact:
        """Return this artifact as a description only, its tensors having been packed."""
        return replace(self, tensors={})


def read_artifact(files: Files, geometry: Geometry, base_sha256: str | None = None) -> Artifact:
    """Validate an adapter folder's files against a base.

    Args:
        files: The folder's content.
        geometry: What the base offers.
        base_sha256: SHA-256 of the base's model.safetensors, compared where the rules name one.

    Raises:
        AdapterRefused: With every problem that was found.
    """
    spec, rules, problems = read_spec(files.contents)
    stored = _read_tensors(files.contents[WEIGHTS], problems)
    if spec is None or rules is None or stored is None:
        raise AdapterRefused(files.task, problems)
    problems += _base_problems(spec, rules, geometry, base_sha256)
    tokenizer = geometry.tokenizer
    compared = Comparison() if tokenizer is None else tokenizer.compare(files.contents)
    problems += compared.problems
    sorter = _Sorter(spec, geometry, problems)
    try:
        # safetensors gives them in random order: weights first, as `_head_shape` needs.
        for name in sorted(stored, key=lambda name: (not name.endswith(".weight"), name)):
            sorter.place(name, stored[name])
        sorter.finish()
    except PatternTooSlow as error:
        raise AdapterRefused(files.task, [*problems, str(error)]) from None
    num_labels = sorter.num_labels
    for source, labels in (("task.json", rules.labels), ("config.json", spec.labels)):
        if labels is not None and num_labels and len(labels) != num_labels:
            problems.append(f"{source} names {len(labels)} labels, the head has {num_labels}")
    artifact = Artifact(
        task=files.task,
        version=files.version,
        spec=spec,
        rules=rules,
        num_labels=num_labels,
        num_bytes=sum(tensor.nbytes for tensor in stored.values()),
        training_length=compared.max_length,
        tensors=sorter.tensors,
    )
    if artifact.problem_type == "single_label_classification" and num_labels == 1:
        problems.append("single_label_classification of one label would always be sure of it")
    if artifact.problem_type == "regression" and rules.threshold is not None:
        problems.append("task.json: threshold means nothing for a regression")
    if problems:
        raise AdapterRefused(files.task, problems)
    return artifact


def _read_tensors(content: bytes, problems: list[str]) -> dict[str, torch.Tensor] | None:
    try:
        return load_safetensors(content)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        reason = f"dtype {error}" if isinstance(error, KeyError) else error
        problems.append(f"{WEIGHTS} cannot be read ({reason})")
        return None


def _base_problems(
    spec: Spec, rules: Rules, geometry: Geometry, base_sha256: str | None
) -> list[str]:
    """Say where an adapter is another base's: by class, hub id, digest or input length."""
    problems = []
    if spec.base_class not in (None, geometry.architecture):
        problems.append(f"it was trained on a {spec.base_class}, not {geometry.architecture}")
    theirs, ours = hub_id(spec.base), {geometry.base_id or "", *geometry.base_aliases} - {""}
    if theirs and ours and theirs not in ours:
        problems.append(
            f"it was trained on the base {theirs}, not {geometry.base_id or min(ours)}; "
            "if they are the same, name it in base_aliases"
        )
    if rules.base_sha256 not in (None, base_sha256):
        problems.append(
            f"task.json: base_sha256 is {rules.base_sha256[:8]}…, "
            f"but the base served here has {base_sha256[:8] + '…' if base_sha256 else 'none'}"
        )
    longest = geometry.max_positions
    if rules.max_length and longest and rules.max_length > longest:
        problems.append(f"task.json: max_length {rules.max_length} is over the base's {longest}")
    return problems


@dataclass(slots=True)
class _Sorter:
    """Puts every stored tensor to its site, and remembers what fits nowhere.

    Attributes:
        tensors: Bank field -> tensor, as `Artifact.tensors`.
        seen: Bank fields that the file has, right or wrong, so that none is also called missing.
        unmatched: Stored names that belong to no site.
        misshapen: A sentence for each tensor of a wrong shape.
    """

    spec: Spec
    geometry: Geometry
    problems: list[str]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    unmatched: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    num_labels: int = 0

    def place(self, name: str, tensor: torch.Tensor) -> None:
        """Take one stored tensor: a half of a LoRA pair, or a weight or bias of the head."""
        if not name.startswith(_PREFIX):
            self.unmatched.append(name)
            return
        path, _, leaf = name.removeprefix(_PREFIX).rpartition(".")
        owner, _, half = path.rpartition(".")
        if half in ("lora_A", "lora_B") and leaf == "weight":
            want = self._lora_shape(owner, half)
            key = f"{owner}.{half}"
        else:
            want = self._head_shape(path, leaf, tensor)
            key = f"{path}.{leaf}"
        if want is None:
            self.unmatched.append(name)
            return
        self.seen.add(key)
        if tensor.dtype not in _FLOATS:
            self.problems.append(f"{name} has dtype {tensor.dtype}, not a float")
        elif tuple(tensor.shape) != want:
            self.misshapen.append(f"{name} is {list(tensor.shape)}, not {list(want)}")
        else:
            read = self._as_read(half, tensor.float())
            # As it will be read: fp64, or a scaling, may hold more than fp32 can.
            if torch.isfinite(read).all():
                self.tensors[key] = read
            else:
                self.problems.append(f"{name} holds NaN or infinite values")

    def _as_read(self, half: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor as its site reads it: LoRA transposed, with the scaling in B."""
        # Folding the scaling into B once spares a multiplication a row, a site and a batch.
        if half == "lora_B":
            tensor = tensor * self.spec.scaling
        return tensor.t().contiguous() if half in ("lora_A", "lora_B") else tensor

    def _lora_shape(self, path: str, half: str) -> tuple[int, ...] | None:
        """Return the shape of half of a LoRA pair as PEFT stores it, or None where none may be."""
        if path not in self.geometry.linears or not self.spec.targets(path):
            return None
        rank, site = self.spec.rank, self.geometry.sites.get(path)
        if site is None:
            problem = f"{path} is not served; add it to lora_targets"
            if problem not in self.problems:
                self.problems.append(problem)
            return ()
        return (rank, site.in_features) if half == "lora_A" else (site.out_features, rank)

    def _head_shape(self, path: str, leaf: str, tensor: torch.Tensor) -> tuple[int, ...] | None:
        """Return the shape that a head's weight or bias must have, or None if it is no head's."""
        site = self.geometry.sites.get(path)
        if site is None or site.kind != "head" or leaf not in ("weight", "bias"):
            return None
        if leaf == "bias" and not site.bias:
            return None
        rows = site.out_features
        if site.labelled:
            # The weight, which comes first, has the say on the number of labels.
            if not self.num_labels and tensor.ndim == (2 if leaf == "weight" else 1):
                self.num_labels = tensor.shape[0]
            rows = self.num_labels or rows
        return (rows, site.in_features) if leaf == "weight" else (rows,)

    def finish(self) -> None:
        """Say what is missing, what matched nothing, and what is over the geometry."""
        if self.spec.rank > self.geometry.max_rank:
            self.problems.append(
                f"its rank {self.spec.rank} is over max_lora_rank={self.geometry.max_rank}"
            )
        if self.num_labels > self.geometry.max_labels:
            self.problems.append(
                f"its {self.num_labels} labels are over max_labels={self.geometry.max_labels}"
            )
        if self.unmatched:
            self.problems.append(f"tensors that match nothing here: {_shorten(self.unmatched)}")
        if self.misshapen:
            self.problems.append(_shorten(self.misshapen))
        head = self._missing("head")
        if head:
            self.problems.append(f"it has no head weights: {_shorten(head)} missing")
        lora = self._missing("lora")
        if lora:
            self.problems.append(f"promised by target_modules but missing: {_shorten(lora)}")

    def _missing(self, kind: str) -> list[str]:
        """Return the bank fields of one kind that the spec promises and the file has not."""
        names: list[str] = []
        for path, site in self.geometry.sites.items():
            if site.kind != kind:
                continue
            if kind == "head":
                names += [f"{path}.weight", f"{path}.bias"][: 1 + site.bias]
            elif self.spec.targets(path):
                names += [f"{path}.lora_A", f"{path}.lora_B"]
        return [name for name in names if name not in self.seen]


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
