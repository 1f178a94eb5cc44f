"""What an adapter says of itself, read from its JSON files and validated. No torch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as shorten
from typing import Any, Literal

from adapters.geometry import TaskType
from adapters.matching import MAX_NAMES, Matching, check_pattern, pattern_value, read_matching
from adapters.rules import ProblemType, Rules, read_rules

Method = Literal["lora", "dora", "ia3"]

# Keys of adapter_config.json that say how the adapter is computed, and are read below.
_READ = {
    "peft_type", "task_type", "base_model_name_or_path", "auto_mapping", "r", "lora_alpha",
    "target_modules", "exclude_modules", "use_rslora", "modules_to_save", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias",
    "feedforward_modules",
}  # fmt: skip
# Keys that matter to training, or to where the files came from, and not to an answer. That a
# linear's weight is stored transposed (fan_in_fan_out) is the base's to know.
_WITHOUT_EFFECT = {
    "peft_version", "revision", "inference_mode", "lora_dropout", "megatron_core",
    "qalora_group_size", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "init_ia3_weights", "loftq_config", "corda_config", "lora_ga_config", "runtime_config",
}  # fmt: skip
_MAX_KEYS = 1000
_LARGEST = sys.float_info.max
# Initialisations that leave the base as it is; the others change its weights at training.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# Methods that add a matrix to a weight, which PEFT can turn into a LoRA.
_CONVERTIBLE = {
    "C3A", "DELORA", "FOURIERFT", "GRALORA", "LOHA", "LOKR", "MISS", "PSOFT", "RANDLORA",
    "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Spec:
    """A classifier adapter as its `adapter_config.json` and `config.json` describe it.

    Attributes:
        method: `dora` is LoRA with a magnitude an output (arXiv:2402.09353); `ia3` has vectors
            instead of LoRA (arXiv:2205.05638).
        task_type: Whether it classifies sequences or tokens.
        matching: Which modules it adapts and which it brings whole.
        rank: LoRA rank r, of modules that `rank_pattern` does not name; 0 for IA3.
        alpha: LoRA alpha, likewise.
        rank_pattern: End of a module path, or a pattern of one -> rank.
        alpha_pattern: Likewise, alpha.
        use_rslora: Whether the scaling is alpha/sqrt(r) (arXiv:2312.03732) instead of alpha/r.
        bias: Which biases it brings: of no module, of those with LoRA, or of all.
        lora_bias: Whether B has a bias.
        base: `base_model_name_or_path`, a hub id or a path; None if the config has none.
        base_class: The base's transformers class if the config names it.
        labels: Names by index from config.json, or None.
        problem_type: From config.json, or None.
    """

    method: Method
    task_type: TaskType
    matching: Matching
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    bias: Literal["none", "lora_only", "all"]
    lora_bias: bool
    base: str | None
    base_class: str | None
    labels: tuple[str, ...] | None
    problem_type: ProblemType | None

    def rank_of(self, path: str) -> int:
        """Return a module's LoRA rank."""
        return int(pattern_value(self.rank_pattern, path, self.rank))

    def scaling_of(self, path: str) -> float:
        """Return what a module's x·A·B is multiplied with (PEFT's `LoraLayer.update_layer`)."""
        rank, alpha = self.rank_of(path), pattern_value(self.alpha_pattern, path, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_spec(files: Mapping[str, bytes]) -> tuple[Spec | None, Rules | None, list[str]]:
    """Read an adapter's JSON files.

    Args:
        files: File name -> content of `adapter_config.json` and, where present, `config.json`
            and `task.json`.

    Returns:
        The spec, the rules, and one sentence for each problem. Spec or rules are None where a
        problem leaves nothing to go on with.
    """
    problems: list[str] = []
    config = _read_object("adapter_config.json", files, problems)
    model_config = _read_object("config.json", files, problems) if "config.json" in files else {}
    rules = read_task_json(files, problems)
    if config is None or model_config is None:
        return None, rules, problems
    return _read_config(config, model_config, problems), rules, problems


def read_task_json(files: Mapping[str, bytes], problems: list[str]) -> Rules | None:
    """Read `task.json`, if it is there; put a sentence for each problem into `problems`."""
    raw = _read_object("task.json", files, problems) if "task.json" in files else {}
    return read_rules(raw, problems) if raw is not None else None


def _read_object(
    name: str, files: Mapping[str, bytes], problems: list[str]
) -> dict[str, Any] | None:
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        problems.append(f"{name} is not valid JSON ({error})")
        return None
    if not isinstance(value, dict):
        problems.append(f"{name} must hold a JSON object")
        return None
    if len(value) > _MAX_KEYS:
        problems.append(f"{name} has {len(value)} keys, over the limit of {_MAX_KEYS}")
        return None
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        problems.append(f"{name} holds what is no text, or parts too deep in each other")
        return None
    return value


def _read_config(
    config: dict[str, Any], model_config: dict[str, Any], problems: list[str]
) -> Spec | None:
    peft_type = config.get("peft_type")
    if peft_type not in ("LORA", "IA3"):
        problems.append(_other_method(peft_type))
        return None
    mapping = config.get("auto_mapping")
    base_class = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    # Without a task type PEFT notes the class that it wrapped.
    of_tokens = isinstance(base_class, str) and base_class.endswith("ForTokenClassification")
    task_type = config.get("task_type") or ("TOKEN_CLS" if of_tokens else "SEQ_CLS")
    if task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        problems.append(f"task_type {task_type!r} is not served; SEQ_CLS and TOKEN_CLS are")
    for key, value in config.items():
        problem = _key_problem(key, value)
        if problem:
            problems.append(problem)
    before = len(problems)  # what follows leaves nothing to go on with
    matching = read_matching(config, problems)
    ranks, alphas = _read_lora(config, problems) if peft_type == "LORA" else ({}, {})
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        problems.append(f"base_model_name_or_path must be a name, not {shorten(base)}")
    labels, problem_type = _read_labels(model_config, problems)
    if len(problems) > before or task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    lora: Method = "dora" if config.get("use_dora") else "lora"
    bias = config.get("bias")
    return Spec(
        method="ia3" if peft_type == "IA3" else lora,
        task_type=task_type,  # type: ignore[arg-type]  # checked above
        matching=matching,
        rank=config["r"] if peft_type == "LORA" else 0,
        alpha=float(config["lora_alpha"]) if peft_type == "LORA" else 0.0,
        rank_pattern=ranks,  # type: ignore[arg-type]  # checked to be whole
        alpha_pattern=alphas,
        use_rslora=bool(config.get("use_rslora")),
        bias=bias if bias in ("lora_only", "all") else "none",
        lora_bias=bool(config.get("lora_bias")),
        base=base,
        base_class=base_class,
        labels=labels,
        problem_type=problem_type,
    )


def _other_method(peft_type: object) -> str:
    sentence = f"peft_type {shorten(peft_type)} is not served; LORA (with DoRA) and IA3 are"
    if isinstance(peft_type, str) and peft_type in _CONVERTIBLE:
        sentence += "; PEFT makes a LoRA of it: peft.save_as_lora(folder, model, rank=16)"
    return sentence


def _other_base(init: Any) -> str:
    """Say why an adapter of an initialisation is no plain difference to the base."""
    sentence = f"init_lora_weights={shorten(init)} changes the base at training"
    if isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "lora_ga")):
        # With them PEFT forgets modules_to_save while it converts.
        return (
            f"{sentence}; save it as a plain LoRA with path_initial_model_for_weight_conversion "
            "and put the tensors of its head into that file"
        )
    return f"{sentence}; train with another one"


def _key_problem(key: str, value: Any) -> str | None:
    """Return a sentence if this key of adapter_config.json asks for what is not served."""
    told = shorten(value)
    if key in _WITHOUT_EFFECT or key in _READ:
        return None
    if key == "init_lora_weights":
        return None if value in _PLAIN_INITS else _other_base(value)
    if key == "bias":
        known = value in (None, "none", "lora_only", "all")
        return None if known else f"bias={told} is not one of 'none', 'lora_only', 'all'"
    # A feature that is off says nothing: None, False, {} and [] are how PEFT writes that.
    return f"{key}={told} is not served" if value else None


def _read_lora(
    config: dict[str, Any], problems: list[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Check rank and alpha, and return their patterns."""
    if not _is_rank(config.get("r")):
        problems.append(f"r must be a positive integer, not {shorten(config.get('r'))}")
    if not _is_number(config.get("lora_alpha")):
        problems.append(f"lora_alpha must be a number, not {shorten(config.get('lora_alpha'))}")
    patterns: list[dict[str, float]] = []
    for key, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        given = config.get(key) or {}
        if isinstance(given, dict) and len(given) > MAX_NAMES:
            problems.append(f"{key} has {len(given)} names, over the limit of {MAX_NAMES}")
            given = {}
        if not isinstance(given, dict) or not all(fits(value) for value in given.values()):
            problems.append(f"{key} must map module names to numbers, not {shorten(given)}")
            given = {}
        for name in given:
            check_pattern(key, name, problems)
        patterns.append(given)
    return patterns[0], patterns[1]


def _is_rank(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: object) -> bool:
    # "Not at most", so that NaN is refused too.
    return type(value) in (int, float) and abs(value) <= _LARGEST  # type: ignore[arg-type]


def _read_labels(
    config: dict[str, Any], problems: list[str]
) -> tuple[tuple[str, ...] | None, ProblemType | None]:
    """Read id2label and problem_type, as transformers writes them into config.json."""
    problem_type = config.get("problem_type")
    if problem_type not in (None, *ProblemType.__args__):  # type: ignore[attr-defined]
        problems.append(f"config.json: problem_type {problem_type!r} is not served")
        problem_type = None
    id2label = config.get("id2label")
    if id2label is None:
        return None, problem_type
    try:
        by_index = {int(index): str(label) for index, label in id2label.items()}
        labels = tuple(by_index[index] for index in range(len(by_index)))
    except (AttributeError, ValueError, KeyError):
        problems.append("config.json: id2label must map 0…n-1 to names")
        return None, problem_type
    if len(set(labels)) < len(labels):
        problems.append("config.json: the names in id2label must differ from each other")
    return labels, problem_type
