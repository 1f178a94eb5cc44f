"""A base as transformers loads it: its encoder, and a class for each task type."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from adapters.geometry import TaskType
from deployments.base import BaseName, BaseUnavailable

_AUTO: dict[TaskType, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base in evaluation mode, on the CPU.

    Attributes:
        models: Task type -> a classifier. That of sequences has the encoder that all share; those
            of others are there for their head and the names of their modules.
        missing: Task type -> parameters that the checkpoint does not bring.
    """

    models: dict[TaskType, PreTrainedModel]
    missing: dict[TaskType, frozenset[str]]

    @classmethod
    def load(cls, base: BaseName, dtype: torch.dtype) -> Checkpoint:
        """Load a base.

        Raises:
            BaseUnavailable: It cannot be had.
        """
        config = base_config(base)
        _leave_heads_alone(config)
        models: dict[TaskType, PreTrainedModel] = {}
        missing: dict[TaskType, frozenset[str]] = {}
        model, lacks = _load(AutoModelForSequenceClassification, base, config, dtype)
        models["SEQ_CLS"], missing["SEQ_CLS"] = model, lacks | _foreign(config, model)
        if type(config) in AutoModelForTokenClassification._model_mapping:
            model = on_meta(config, "TOKEN_CLS")
            if type(model).__name__ in (config.architectures or []):
                model, lacks = _load(AutoModelForTokenClassification, base, config, dtype)
            else:
                lacks = frozenset(outside(model))
            models["TOKEN_CLS"], missing["TOKEN_CLS"] = model, lacks
        return cls(models, missing)

    @classmethod
    def on_meta(cls, base: BaseName) -> Checkpoint:
        """Return a base's shapes, as if its checkpoint brought every weight.

        Raises:
            BaseUnavailable: It cannot be had.
        """
        config = base_config(base)
        auto = _AUTO.items()
        models = {t: on_meta(config, t) for t, cls in auto if type(config) in cls._model_mapping}
        return cls(models, dict.fromkeys(models, frozenset()))


def base_config(base: BaseName) -> PretrainedConfig:
    """Return the base's transformers config without its weights.

    Raises:
        BaseUnavailable: It cannot be had.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(base.path, revision=base.revision)
    except (OSError, ValueError) as error:
        raise _unavailable(base, error) from None
    return config


def on_meta(config: PretrainedConfig, task_type: TaskType) -> PreTrainedModel:
    """Return a classifier with shapes but no weights, which costs no memory."""
    with torch.device("meta"):
        model: PreTrainedModel = _AUTO[task_type].from_config(config)
    model.eval()
    return model


def outside(model: PreTrainedModel) -> list[str]:
    """Return the parameters that do not belong to the encoder."""
    prefix = model.base_model_prefix + "."
    return [name for name, _ in model.named_parameters() if not name.startswith(prefix)]


def linears_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return every linear by module path: nn.Linear, quantised or not, and Conv1D."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def _leave_heads_alone(config: PretrainedConfig) -> None:
    """Keep heads out of the quantisation of a base that is quantised already."""
    quantized = getattr(config, "quantization_config", None)
    if isinstance(quantized, dict):
        model = on_meta(config, "SEQ_CLS")
        heads = [n for n, _ in model.named_children() if n != model.base_model_prefix]
        skipped = quantized.get("llm_int8_skip_modules") or []
        # Named from the encoder on if it was saved without a head.
        inside = [f"{model.base_model_prefix}.{name}" for name in skipped]
        quantized["llm_int8_skip_modules"] = [*skipped, *inside, *heads]


def _foreign(config: PretrainedConfig, model: PreTrainedModel) -> frozenset[str]:
    """Return the head's parameters if the checkpoint was saved from another class.

    A head of another kind may have the same names and shapes, and would answer at random.
    """
    saved_from = config.architectures or []
    return frozenset() if type(model).__name__ in saved_from else frozenset(outside(model))


def _load(
    auto: Any, base: BaseName, config: PretrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, frozenset[str]]:
    """Load a class's weights; also return the parameters that the checkpoint does not bring."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is what is meant here
    try:
        model, info = auto.from_pretrained(
            base.path,
            revision=base.revision,
            config=copy.deepcopy(config),  # it becomes the model's, which changes it
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError) as error:
        raise _unavailable(base, error) from None
    finally:
        logging.set_verbosity(verbosity)
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    return model.eval().requires_grad_(False), frozenset(info["missing_keys"]) | mismatched


def _unavailable(base: BaseName, error: Exception) -> BaseUnavailable:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return BaseUnavailable(f"base_model={str(base)!r} cannot be loaded: {reason}")
