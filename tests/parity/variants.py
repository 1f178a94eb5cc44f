"""The adapters of the matrix, one line each: what can be said of a LoRA, DoRA or IA3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig

from tests.parity.bases import Base
from tests.parity.expectations import RIGHT, Expectation, PeftCannot, Refused
from tests.parity.methods import METHODS

Configure = Callable[[Base], PeftConfig]


@dataclass(frozen=True, repr=False)
class Variant:
    """One kind of adapter.

    Attributes:
        config: Makes its PEFT config for a base.
        form: Which form of the base it is trained on.
        want: What its cells must turn out to be.
        unlike: What other architectures' cells must turn out to be, where that differs.
        only: Says for which bases it means anything.
        convert: Whether it is saved as a difference from how it was initialised.
        task: Whether it labels a text or each of its tokens.
    """

    name: str
    config: Configure
    form: str = "bare"
    want: Expectation = RIGHT
    unlike: Callable[[Base], Expectation | None] = lambda base: None
    only: Callable[[Base], bool] = lambda base: True
    convert: bool = False
    task: str = "sequence"

    def __repr__(self) -> str:
        return self.name

    def expectation(self, base: Base) -> Expectation:
        return self.unlike(base) or self.want


def lora(
    *more: Callable[[Base], dict[str, Any]], task: str | None = "SEQ_CLS", **fixed: Any
) -> Configure:
    """LoRA on the attention's linears, with what else is said."""

    def configure(base: Base) -> LoraConfig:
        said: dict[str, Any] = {
            "task_type": task,
            "r": 4,
            "lora_alpha": 8,
            "target_modules": [*base.attention],
            "modules_to_save": [*base.head] or None if task else None,
        }
        for part in more:
            said |= part(base)
        return LoraConfig(**said | fixed)

    return configure


def ia3(
    targets: Callable[[Base], tuple[str, ...]],
    feedforward: bool,
    task: str | None = "SEQ_CLS",
) -> Configure:
    def configure(base: Base) -> IA3Config:
        return IA3Config(
            task_type=task,
            target_modules=[*targets(base)],
            feedforward_modules=[base.ffn_out] if feedforward else [],
            modules_to_save=[*base.head] or None if task else None,
        )

    return configure


def also(*names: str) -> Callable[[Base], dict[str, Any]]:
    """More targets, by the names of a base's attributes."""
    return lambda base: {
        "target_modules": [*base.attention, *(getattr(base, name) for name in names)]
    }


def _regex(base: Base) -> dict[str, Any]:
    names = "|".join(name.replace(".", r"\.") for name in (*base.attention, base.ffn))
    return {"target_modules": rf".*\.{_last_layer(base)}\..*({names})"}


def _patterns(base: Base) -> dict[str, Any]:
    first = base.attention[0].replace(".", r"\.")
    return also("ffn", "ffn_out")(base) | {
        "rank_pattern": {base.ffn: 2, rf".*\.{_last_layer(base)}\..*{first}": 6},
        "alpha_pattern": {base.ffn_out: 3, rf".*\.0\..*{first}": 1},
    }


def _layers(base: Base) -> dict[str, Any]:
    return {"layers_to_transform": [_last_layer(base)]}


def _layers_pattern(base: Base) -> dict[str, Any]:
    return _layers(base) | {"layers_pattern": base.layers}


def _last_layer(base: Base) -> int:
    return 0 if base.model_type == "albert" else 1  # which has one layer, used twice


def _pooler(base: Base) -> dict[str, Any]:
    return {"modules_to_save": ["pooler"]}


def _no_head(base: Base) -> dict[str, Any]:
    return {"modules_to_save": None}


def _headless(base: Base) -> Expectation | None:
    return Refused("no head weights") if base.head else None


def _no_olora(base: Base) -> Expectation | None:
    # It takes a Conv1D's weight for a linear's, so that its A and B have each other's shape.
    return PeftCannot("mat1 and mat2 shapes") if base.conv1d else None


ALL_LINEAR = {"target_modules": "all-linear"}
_key_value = lambda base: base.key_value  # noqa: E731
_with_ffn = lambda base: (*base.key_value, base.ffn_out)  # noqa: E731

LORAS = (
    Variant("lora", lora()),
    Variant("lora-all-linear", lora(r=3, **ALL_LINEAR)),
    Variant("lora-regex", lora(_regex)),
    Variant("lora-exclude", lora(lambda b: {"exclude_modules": [b.ffn_out]}, **ALL_LINEAR)),
    Variant("lora-rslora", lora(r=7, use_rslora=True)),
    Variant("lora-patterns", lora(_patterns)),
    Variant("lora-patterns-rslora", lora(_patterns, use_rslora=True)),
    Variant("lora-bias-all", lora(bias="all")),
    Variant("lora-bias-only", lora(bias="lora_only")),
    Variant("lora-own-bias", lora(also("ffn"), lora_bias=True)),
    Variant("lora-layers", lora(_layers)),
    Variant("lora-layers-pattern", lora(_layers_pattern)),
    Variant("lora-fan-in-fan-out", lora(also("ffn"), fan_in_fan_out=True)),
    Variant("lora-dropout", lora(lora_dropout=0.3)),
    Variant("lora-embedding", lora(also("embedding"))),
    Variant("lora-default-head", lora(_no_head), unlike=_headless),
    Variant("lora-pooler", lora(_pooler), only=lambda base: base.pooler is not None),
)
DORAS = (
    Variant("dora", lora(use_dora=True)),
    Variant("dora-rslora-all-linear", lora(r=5, use_dora=True, use_rslora=True, **ALL_LINEAR)),
    Variant("dora-patterns", lora(_patterns, use_dora=True)),
    Variant("dora-embedding", lora(also("embedding"), use_dora=True)),
    Variant("dora-bias-all", lora(use_dora=True, bias="all")),
)
IA3S = (
    Variant("ia3", ia3(_with_ffn, feedforward=True)),
    Variant("ia3-attention", ia3(_key_value, feedforward=False)),
    Variant("ia3-ffn-as-output", ia3(_with_ffn, feedforward=False)),
)
TRAINED = (
    Variant("trained-head", lora(), "trained"),
    Variant("trained-no-head", lora(task=None), "trained"),
    Variant("trained-all-linear", lora(task=None, **ALL_LINEAR), "trained"),
    Variant("trained-lora-on-head", lora(also("logits"), task=None), "trained"),
    Variant("trained-dora-on-head", lora(also("logits"), task=None, use_dora=True), "trained"),
    Variant("trained-ia3", ia3(_with_ffn, feedforward=True, task=None), "trained"),
    Variant("trained-bias-all", lora(task=None, bias="all"), "trained"),
    Variant("trained-dora", lora(task=None, use_dora=True), "trained"),
)
INITS = (
    Variant("init-gaussian", lora(init_lora_weights="gaussian")),
    Variant("init-orthogonal", lora(init_lora_weights="orthogonal")),
    Variant("init-eva", lora(init_lora_weights="eva")),
    Variant("init-pissa", lora(init_lora_weights="pissa"), want=Refused("changes the base")),
    Variant("init-olora", lora(init_lora_weights="olora"), want=Refused("changes the base")),
    # While it converts, PEFT drops modules_to_save; nobody may then answer with another head.
    Variant("init-pissa-converted", lora(init_lora_weights="pissa"), convert=True,
            want=Refused("no head weights")),
    Variant("trained-pissa-converted-with-head", lora(init_lora_weights="pissa"), "trained",
            convert=True, want=Refused("no head weights")),
    Variant("trained-pissa-converted", lora(init_lora_weights="pissa", task=None), "trained",
            convert=True),
    Variant("trained-olora-converted", lora(init_lora_weights="olora", task=None), "trained",
            convert=True, unlike=_no_olora),
)  # fmt: skip
OTHERS = tuple(
    Variant(method.name, method.config, want=method.want, unlike=method.unlike)
    for method in METHODS
)
VARIANTS = (*LORAS, *DORAS, *IA3S, *TRAINED, *INITS, *OTHERS)
TOKENS = (Variant("token-lora", lora(task="TOKEN_CLS"), task="token"),)
