"""What an adapter says of itself, read from its JSON files and validated. No torch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as shorten
from typing import Any

from adapters.pattern import fullmatch, pattern_problem
from adapters.rules import ProblemType, Rules, read_rules

# Keys of adapter_config.json that say how the adapter is computed, and are read below.
_READ = {
    "peft_type", "task_type", "base_model_name_or_path", "auto_mapping", "r", "lora_alpha",
    "target_modules", "exclude_modules", "use_rslora", "modules_to_save", "layers_to_transform",
    "layers_pattern",
}  # fmt: skip
# Keys that matter to training, or to where the files came from, and not to an answer.
_WITHOUT_EFFECT = {
    "peft_version", "revision", "inference_mode", "lora_dropout", "megatron_core",
    "qalora_group_size", "ensure_weight_tying", "eva_config",
}  # fmt: skip
_MAX_KEYS, _MAX_NAMES = 1000, 10_000
_LARGEST = sys.float_info.max
# Initialisations that leave the base as it is; the others change its weights at training.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True)
class Spec:
    """A LoRA classifier as its `adapter_config.json` and `config.json` describe it.

    Attributes:
        rank: LoRA rank r.
        alpha: LoRA alpha; with `rank` and `use_rslora` it gives `scaling`.
        use_rslora: Whether the scaling is alpha/sqrt(r) (arXiv:2312.03732) instead of alpha/r.
        target_modules: Names or one regular expression, as PEFT matches them.
        exclude_modules: Likewise, for modules left out; empty for none.
        modules_to_save: Modules trained whole, matched by the end of their path.
        base: `base_model_name_or_path`, a hub id or a path; None if the config has none.
        base_class: The base's transformers class if the config names it.
        labels: Names by index from config.json, or None.
        problem_type: From config.json, or None.
    """

    rank: int
    alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    modules_to_save: tuple[str, ...]
    base: str | None
    base_class: str | None
    labels: tuple[str, ...] | None
    problem_type: ProblemType | None

    @property
    def scaling(self) -> float:
        """What x·A·B is multiplied with (PEFT's `LoraLayer.update_layer`)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def targets(self, module: str) -> bool:
        """Tell whether PEFT would put LoRA on this module path (`check_target_module_exists`)."""
        return _matches(module, self.target_modules) and not _matches(module, self.exclude_modules)


def _matches(module: str, patterns: tuple[str, ...] | str) -> bool:
    if patterns == "all-linear":
        return True
    if isinstance(patterns, str):
        return fullmatch(patterns, module)
    return any(module == name or module.endswith("." + name) for name in patterns)


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
    raw_rules = _read_object("task.json", files, problems) if "task.json" in files else {}
    rules = read_rules(raw_rules, problems) if raw_rules is not None else None
    if config is None or model_config is None:
        return None, rules, problems
    return _read_config(config, model_config, problems), rules, problems


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
    method = config.get("peft_type")
    if method != "LORA":
        problems.append(f"peft_type {method!r} is not served; only LORA is")
        return None
    if config.get("task_type") not in (None, "SEQ_CLS"):
        problems.append(f"task_type {config['task_type']!r} is not served; only SEQ_CLS is")
    for key, value in config.items():
        problem = _key_problem(key, value)
        if problem:
            problems.append(problem)
    before = len(problems)  # what follows leaves nothing to go on with
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        problems.append(f"r must be a positive integer, not {shorten(rank)}")
    # "Not at most", so that NaN is refused too.
    if type(alpha) not in (int, float) or not abs(alpha) <= _LARGEST:  # type: ignore[arg-type]
        problems.append(f"lora_alpha must be a number, not {shorten(alpha)}")
    names = {
        key: _names(key, config.get(key), problems)
        for key in ("target_modules", "exclude_modules", "modules_to_save")
    }
    if not names["target_modules"]:
        problems.append("target_modules names nothing")
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        problems.append(f"base_model_name_or_path must be a name, not {shorten(base)}")
    labels, problem_type = _read_labels(model_config, problems)
    if len(problems) > before:
        return None
    saved = names["modules_to_save"]
    mapping = config.get("auto_mapping")
    return Spec(
        rank=int(rank),  # type: ignore[arg-type]  # checked above
        alpha=float(alpha),  # type: ignore[arg-type]
        use_rslora=bool(config.get("use_rslora")),
        target_modules=names["target_modules"],
        exclude_modules=names["exclude_modules"],
        modules_to_save=(saved,) if isinstance(saved, str) else saved,
        base=base,
        base_class=mapping.get("base_model_class") if isinstance(mapping, dict) else None,
        labels=labels,
        problem_type=problem_type,
    )


def _key_problem(key: str, value: Any) -> str | None:
    """Return a sentence if this key of adapter_config.json asks for what is not served."""
    if key in _WITHOUT_EFFECT:
        return None
    told = shorten(value)
    if key in ("layers_to_transform", "layers_pattern") and value:
        return f"{key}={told} is not served"
    if key in _READ:
        return None
    if key == "init_lora_weights":
        return None if value in _PLAIN_INITS else f"init_lora_weights={told} changes the base"
    if key == "bias":
        return None if value == "none" else f"bias={told} is not served; only 'none' is"
    # A feature that is off says nothing: None, False, {} and [] are how PEFT writes that.
    return f"{key}={told} is not served" if value else None


def _names(key: str, value: Any, problems: list[str]) -> tuple[str, ...] | str:
    """Return a list of names, or one regular expression, as PEFT takes them."""
    if value is None:
        return ()
    if isinstance(value, str):
        problem = pattern_problem(value)
        if problem:
            problems.append(f"{key} {problem}")
        return value
    if isinstance(value, list) and len(value) > _MAX_NAMES:
        problems.append(f"{key} has {len(value)} names, over the limit of {_MAX_NAMES}")
        return ()
    if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    problems.append(f"{key} must be a list of names, not {shorten(value)}")
    return ()


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
