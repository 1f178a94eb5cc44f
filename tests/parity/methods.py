"""The methods of PEFT that the engine does not serve, one line each: they must be refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
from peft import PeftConfig

from tests.parity.bases import Base
from tests.parity.expectations import Expectation, PeftCannot, Refused


@dataclass(frozen=True)
class Method:
    name: str
    config: Callable[[Base], PeftConfig]
    want: Expectation
    unlike: Callable[[Base], Expectation | None] = lambda base: None


def method(cls: str, name: str, linears_only: bool = False, **said: Any) -> Method:
    def unlike(base: Base) -> Expectation | None:
        return PeftCannot("not supported") if linears_only and base.conv1d else None

    def configure(base: Base) -> PeftConfig:
        return getattr(peft, cls)(
            task_type="SEQ_CLS",
            target_modules=[*base.attention],
            modules_to_save=[*base.head] or None,
            **said,
        )

    return Method(name, configure, Refused(name.upper()), unlike)


def prompt(cls: str, name: str, **said: Any) -> Method:
    def configure(base: Base) -> PeftConfig:
        return getattr(peft, cls)(
            task_type="SEQ_CLS",
            num_virtual_tokens=3,
            modules_to_save=[*base.head] or None,
            # PEFT would read these from the base's config, where DistilBERT has other names.
            token_dim=32,
            num_layers=2,
            num_attention_heads=4,
            num_transformer_submodules=1,
            **said,
        )

    return Method(name, configure, Refused(name.upper()))


METHODS = (
    method("LoHaConfig", "loha", linears_only=True),
    method("LoKrConfig", "lokr", linears_only=True),
    method("VeraConfig", "vera"),
    method("OFTConfig", "oft", linears_only=True, oft_block_size=4, r=0),
    method("BOFTConfig", "boft", linears_only=True, boft_block_size=4),
    method("AdaLoraConfig", "adalora", total_step=10),
    method("LNTuningConfig", "ln_tuning"),
    prompt("PromptTuningConfig", "prompt_tuning"),
    prompt("PrefixTuningConfig", "prefix_tuning"),
    prompt("PromptEncoderConfig", "p_tuning", encoder_hidden_size=16),
)
