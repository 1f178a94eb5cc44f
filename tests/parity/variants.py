"""The adapters of the matrix, one line each: what can be said of a LoRA, DoRA or IA3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig

from tests.parity.bases import Base
from tests.parity.expectations import RIGHT, Expectation, PeftCannot, Refused
from tests.parity.methods import METHODS

Configure = Callable[[Base], PeftConfig]
Part = Callable[[Base], dict[str, Any]]


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
        claims: Written over what PEFT wrote into adapter_config.json.
    """

    name: str
    config: Configure
    form: str = "bare"
    want: Expectation = RIGHT
    unlike: Callable[[Base], Expectation | None] = lambda base: None
    only: Callable[[Base], bool] = lambda base: True
    convert: bool = False
    claims: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def of_tokens(self) -> bool:
        return self.name.startswith("token-")

    def __repr__(self) -> str:
        return self.name

    def expectation(self, base: Base) -> Expectation:
        return self.unlike(base) or self.want


def _saved(base: Base, task: str | None) -> list[str] | None:
    """What `modules_to_save` must name; PEFT adds `classifier` and `score` to it by itself."""
    # Token classifiers have no pooler.
    names = [name for name in base.head if not (task == "TOKEN_CLS" and name == "pooler")]
    return names if names and task else None


def lora(*more: Part, task: str | None = "SEQ_CLS", **fixed: Any) -> Configure:
    """LoRA on the attention's linears, with what else is said."""

    def configure(base: Base) -> LoraConfig:
        said: dict[str, Any] = {
            "task_type": task,
            "r": 4,
            "lora_alpha": 8,
            "target_modules": [*base.attention],
            "modules_to_save": _saved(base, task),
        }
        for part in more:
            said |= part(base)
        return LoraConfig(**said | fixed)

    return configure


def ia3(*names: str, feedforward: bool = False, task: str | None = "SEQ_CLS") -> Configure:
    """IA3 on keys and values, and on more linears by the names of a base's attributes."""

    def configure(base: Base) -> IA3Config:
        return IA3Config(
            task_type=task,
            target_modules=[*base.key_value, *(getattr(base, name) for name in names)],
            feedforward_modules=[base.ffn_out] if feedforward else [],
            modules_to_save=_saved(base, task),
        )

    return configure


def also(*names: str) -> Part:
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


def _headless(base: Base) -> Expectation | None:
    # PEFT compares ends of names, so that `classifier` is DistilBERT's `pre_classifier` too.
    left = [name for name in base.head if not name.endswith("classifier")]
    return Refused("no head weights") if left else None


def _no_olora(base: Base) -> Expectation | None:
    # It takes a Conv1D's weight for a linear's, so that A and B have each other's shape.
    return PeftCannot("size mismatch") if base.conv1d else None


def _whole_linear(base: Base) -> dict[str, Any]:
    return {"modules_to_save": [*(_saved(base, "SEQ_CLS") or ()), base.ffn_out]}


def _no_whole_conv1d(base: Base) -> Expectation | None:
    return Refused("brought whole, as only linears and") if base.conv1d else None


def _has_pooler(base: Base) -> bool:
    return base.pooler is not None


ALL_LINEAR = {"target_modules": "all-linear"}
POOLER = {"modules_to_save": ["pooler"]}
MUTATED = Refused("changes the base")
LOST = Refused("no head weights")
# PEFT leaves the head out of all-linear for sequences only, and cannot save what has LoRA on it.
TWICE = PeftCannot("modules_to_save cannot be applied")

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
    Variant("lora-default-head", lora(modules_to_save=None), unlike=_headless),
)
DORAS = (
    Variant("dora", lora(use_dora=True)),
    Variant("dora-rslora-all-linear", lora(r=5, use_dora=True, use_rslora=True, **ALL_LINEAR)),
    Variant("dora-patterns", lora(_patterns, use_dora=True)),
    Variant("dora-bias-all", lora(use_dora=True, bias="all")),
)
IA3S = (
    Variant("ia3", ia3("ffn_out", feedforward=True)),
    Variant("ia3-attention", ia3()),
    Variant("ia3-ffn-as-output", ia3("ffn", "ffn_out")),
)
TRAINED = (
    Variant("trained-head", lora(), "trained"),
    Variant("trained-no-head", lora(task=None), "trained"),
    Variant("trained-all-linear", lora(task=None, **ALL_LINEAR), "trained"),
    Variant("trained-lora-on-head", lora(also("logits"), task=None), "trained"),
    Variant("trained-own-bias-on-head", lora(also("logits"), task=None, lora_bias=True), "trained"),
    Variant("trained-dora-on-head", lora(also("logits"), task=None, use_dora=True), "trained"),
    Variant("trained-ia3", ia3("ffn_out", feedforward=True, task=None), "trained"),
    Variant("trained-ia3-on-head", ia3("logits", task=None), "trained"),
    Variant("trained-bias-all", lora(task=None, bias="all"), "trained"),
    Variant("trained-dora", lora(task=None, use_dora=True), "trained"),
)
BEYOND = (
    Variant("embedding", lora(also("embedding"))),
    Variant("embedding-rslora", lora(also("embedding"), use_rslora=True)),
    Variant(
        "embedding-dora",
        lora(also("embedding"), use_dora=True),
        want=Refused("only LoRA is served"),
    ),
    Variant("embedding-bias-all", lora(also("embedding"), bias="all")),
    Variant("pooler", lora(**POOLER), only=_has_pooler),
    Variant("pooler-dora", lora(use_dora=True, **POOLER), only=_has_pooler),
    Variant("whole-linear", lora(_whole_linear), unlike=_no_whole_conv1d),
    Variant("whole-linear-dora", lora(_whole_linear, use_dora=True), unlike=_no_whole_conv1d),
)
TOKENS = (
    Variant("token-lora", lora(task="TOKEN_CLS")),
    Variant("token-lora-all-linear", lora(task="TOKEN_CLS", **ALL_LINEAR), want=TWICE),
    Variant("token-lora-bias-all", lora(task="TOKEN_CLS", bias="all")),
    Variant("token-dora", lora(task="TOKEN_CLS", use_dora=True)),
    Variant("token-ia3", ia3("ffn_out", feedforward=True, task="TOKEN_CLS")),
)
INITS = (
    Variant("init-gaussian", lora(init_lora_weights="gaussian")),
    Variant("init-orthogonal", lora(init_lora_weights="orthogonal")),
    Variant("init-mica", lora(init_lora_weights="mica")),
    Variant("init-eva", lora(init_lora_weights="eva", eva_config=EvaConfig())),
    Variant("init-pissa", lora(init_lora_weights="pissa"), want=MUTATED),
    Variant("init-olora", lora(init_lora_weights="olora"), want=MUTATED),
    Variant("init-corda", lora(init_lora_weights="corda", corda_config=CordaConfig(
        corda_method="kpm")), want=MUTATED),
    Variant("init-lora-ga", lora(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()),
            want=MUTATED),
    # What LoftQ leaves: to make one, PEFT needs scipy, which is not among our packages.
    Variant("init-loftq", lora(), want=MUTATED, claims={"init_lora_weights": "loftq",
            "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}),
    # While it converts, PEFT drops modules_to_save; nobody may then answer with another head.
    Variant("init-pissa-converted", lora(init_lora_weights="pissa"), convert=True, want=LOST),
    Variant("trained-converted-with-head", lora(init_lora_weights="pissa"), "trained",
            convert=True, want=LOST),
    Variant("trained-pissa-converted", lora(init_lora_weights="pissa", task=None), "trained",
            convert=True),
    Variant("trained-olora-converted", lora(init_lora_weights="olora", task=None), "trained",
            convert=True, unlike=_no_olora),
)  # fmt: skip
OTHERS = tuple(
    Variant(method.name, method.config, want=method.want, unlike=method.unlike)
    for method in METHODS
)
VARIANTS = (*LORAS, *DORAS, *IA3S, *TRAINED, *BEYOND, *TOKENS, *INITS, *OTHERS)
