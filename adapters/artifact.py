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
from adapters.sorter import Sorter
from adapters.spec import Spec, read_spec, read_task_json
from adapters.store import RULES, WEIGHTS, Files
from adapters.tokenizer import Comparison


@dataclass(frozen=True, slots=True)
class Artifact:
    """An adapter, validated against a base and ready to be written into a slot.

    Attributes:
        task: The task it was read for.
        version: 8 hex digits, see `adapters.store.Files`.
        spec: What its config says.
        rules: What its task.json says, or others that were laid over it.
        num_labels: Rows of its last head linear.
        num_bytes: Size of its tensors as they lie in the file.
        training_length: Longest input in training in tokens, if its tokenizer files tell.
        tensors: Module path and part -> fp32 CPU tensor: `path.lora_A` [rank, in], of an embedding
            [entries, rank], and `path.lora_B` [rank, out], which has the scaling folded in, as
            `path.lora_bias` [out] has; DoRA's `path.magnitude` [out]; `path.ia3` [in] or [out];
            `path.bias` [out], in the place of the base's; of a module that it brings whole
            `path.weight` [out, in] and `path.bias`.
        copies: Parameter -> a tensor that must equal the base's own, or the base is another.
    """

    task: str
    version: str
    spec: Spec
    rules: Rules
    num_labels: int
    num_bytes: int
    training_length: int | None
    tensors: Mapping[str, torch.Tensor]
    copies: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names by index: the rules', else config.json's, else LABEL_0…."""
        named = self.rules.labels or self.spec.labels
        return named or tuple(f"LABEL_{index}" for index in range(self.num_labels))

    @property
    def problem_type(self) -> ProblemType:
        """The task_type's, the rules', config.json's, or transformers' guess from the labels."""
        if self.spec.task_type == "TOKEN_CLS":
            return "token_classification"
        named = self.rules.problem_type or self.spec.problem_type
        return named or ("regression" if self.num_labels == 1 else "single_label_classification")

    def without_tensors(self) -> Artifact:
        """Return this artifact as a description only, its tensors having been packed."""
        return replace(self, tensors={}, copies={})


def read_artifact(
    files: Files, geometry: Geometry, base_sha256: str | None = None, *, ruled: bool = True
) -> Artifact:
    """Validate an adapter folder's files against a base.

    Args:
        files: The folder's content.
        geometry: What the base offers.
        base_sha256: SHA-256 of the base's model.safetensors, compared where the rules name one.
        ruled: Whether its rules are read, and must fit it; `under_rules` does that later if not.

    Raises:
        AdapterRefused: With every problem that was found.
    """
    read = {name: of for name, of in files.contents.items() if ruled or name != RULES}
    spec, rules, problems = read_spec(read)
    stored = _read_tensors(files.contents[WEIGHTS], problems)
    if spec is None or rules is None or stored is None:
        raise AdapterRefused(files.task, problems)
    if spec.task_type not in geometry.graphs:
        problems.append(f"task_type {spec.task_type} is not served: the base has no class for it")
        raise AdapterRefused(files.task, problems)
    problems += _base_problems(spec, geometry)
    tokenizer = geometry.tokenizer
    compared = Comparison() if tokenizer is None else tokenizer.compare(files.contents)
    problems += compared.problems
    sorter = Sorter(spec, geometry, problems)
    try:
        # safetensors gives them in random order: weights first, as a head's shape needs.
        for name in sorted(stored, key=lambda name: (not name.endswith(".weight"), name)):
            sorter.place(name, stored[name])
        sorter.finish()
    except PatternTooSlow as error:
        raise AdapterRefused(files.task, [*problems, str(error)]) from None
    num_labels = sorter.num_labels
    if spec.labels is not None and num_labels and len(spec.labels) != num_labels:
        problems.append(f"config.json names {len(spec.labels)} labels, the head has {num_labels}")
    artifact = Artifact(
        task=files.task,
        version=files.version,
        spec=spec,
        rules=rules,
        num_labels=num_labels,
        num_bytes=sum(tensor.nbytes for tensor in stored.values()),
        training_length=compared.max_length,
        tensors=sorter.tensors,
        copies=sorter.copies,
    )
    if ruled:
        problems += _rule_problems(artifact, geometry, base_sha256)
    if problems:
        raise AdapterRefused(files.task, problems)
    return artifact


def under_rules(
    artifact: Artifact, task_json: bytes, geometry: Geometry, base_sha256: str | None = None
) -> Artifact:
    """Return an artifact that has other rules, which were read and fit it.

    Args:
        artifact: An adapter that is valid but for its rules.
        task_json: The rules.
        geometry: What the base offers.
        base_sha256: As for `read_artifact`.

    Raises:
        AdapterRefused: With every problem that was found.
    """
    problems: list[str] = []
    rules = read_task_json({RULES: task_json}, problems)
    if rules is not None:
        artifact = replace(artifact, rules=rules)
        problems += _rule_problems(artifact, geometry, base_sha256)
    if problems:
        raise AdapterRefused(artifact.task, problems)
    return artifact


def _read_tensors(content: bytes, problems: list[str]) -> dict[str, torch.Tensor] | None:
    try:
        return load_safetensors(content)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        reason = f"dtype {error}" if isinstance(error, KeyError) else error
        problems.append(f"{WEIGHTS} cannot be read ({reason})")
        return None


def _base_problems(spec: Spec, geometry: Geometry) -> list[str]:
    """Say where an adapter is another base's: by class or hub id."""
    problems = []
    architecture = geometry.graphs[spec.task_type].architecture
    if spec.base_class not in (None, architecture):
        problems.append(f"it was trained on a {spec.base_class}, not {architecture}")
    theirs, ours = hub_id(spec.base), {geometry.base_id or "", *geometry.base_aliases} - {""}
    if theirs and ours and theirs not in ours:
        problems.append(
            f"it was trained on the base {theirs}, not {geometry.base_id or min(ours)}; "
            "if they are the same, name it in base_aliases"
        )
    return problems


def _rule_problems(artifact: Artifact, geometry: Geometry, base_sha256: str | None) -> list[str]:
    """Say where an adapter's rules do not fit it or the base."""
    spec, rules, num_labels, problems = artifact.spec, artifact.rules, artifact.num_labels, []
    if rules.base_sha256 not in (None, base_sha256):
        problems.append(
            f"task.json: base_sha256 is {rules.base_sha256[:8]}…, "
            f"but the base served here has {base_sha256[:8] + '…' if base_sha256 else 'none'}"
        )
    longest = geometry.max_positions
    if rules.max_length and longest and rules.max_length > longest:
        problems.append(f"task.json: max_length {rules.max_length} is over the base's {longest}")
    if rules.labels is not None and num_labels and len(rules.labels) != num_labels:
        problems.append(f"task.json names {len(rules.labels)} labels, the head has {num_labels}")
    if artifact.problem_type == "single_label_classification" and num_labels == 1:
        problems.append("single_label_classification of one label would always be sure of it")
    claimed = rules.problem_type or artifact.problem_type
    if (claimed == "token_classification") != (spec.task_type == "TOKEN_CLS"):
        problems.append(f"problem_type {claimed} is not what task_type {spec.task_type} gives")
    return [*problems, *rules.problems(artifact.problem_type, artifact.labels)]
