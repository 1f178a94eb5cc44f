"""What PEFT has besides LoRA, DoRA and IA3, one line each: it must be refused by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from tests.parity.bases import Base
from tests.parity.expectations import Expectation, PeftCannot, Refused

Unlike = Callable[[Base], Expectation | None]


@dataclass(frozen=True)
class Method:
    """A method, or a feature of LoRA, that is not served.

    Attributes:
        want: What its cells must turn out to be.
        unlike: What other architectures' cells must turn out to be, where that differs.
    """

    name: str
    config: Callable[[Base], PeftConfig]
    want: Expectation
    unlike: Unlike = lambda base: None


def no_conv1d(base: Base) -> Expectation | None:
    return PeftCannot("Conv1D") if base.conv1d else None


def method(cls: str, name: str, unlike: Unlike = lambda base: None, **said: Any) -> Method:
    def configure(base: Base) -> PeftConfig:
        more = {"target_modules": [*base.attention], "modules_to_save": [*base.head] or None}
        return getattr(peft, cls)(task_type="SEQ_CLS", **more | said)

    return Method(name, configure, Refused(f"peft_type '{name.upper()}' is not served"), unlike)


def prompt(cls: str, name: str, **said: Any) -> Method:
    # PEFT would read these from the base's config, where DistilBERT has other names.
    sizes = {
        "num_virtual_tokens": 3,
        "token_dim": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_transformer_submodules": 1,
    }

    def configure(base: Base) -> PeftConfig:
        more = {"modules_to_save": [*base.head] or None}
        return getattr(peft, cls)(task_type="SEQ_CLS", **sizes | more | said)

    # Its repr is cut where it is long.
    return Method(name, configure, Refused("is not served; LORA (with DoRA) and IA3 are"))


def feature(name: str, words: str, unlike: Unlike = lambda base: None, **said: Any) -> Method:
    """LoRA with something that changes how it is computed."""

    def configure(base: Base) -> PeftConfig:
        more = {key: make(base) if callable(make) else make for key, make in said.items()}
        return LoraConfig(
            task_type="SEQ_CLS",
            target_modules=[*base.attention],
            modules_to_save=[*base.head] or None,
            **more,
        )

    return Method(name, configure, Refused(words), unlike)


def _trainable_tokens(base: Base) -> PeftConfig:
    return peft.TrainableTokensConfig(
        task_type="SEQ_CLS", token_indices=[5, 6], target_modules=[base.embedding]
    )


def _adaption_prompt(base: Base) -> PeftConfig:
    return peft.AdaptionPromptConfig(task_type="SEQ_CLS", adapter_len=3, adapter_layers=1)


def _unknown_to_adaption_prompt(base: Base) -> Expectation | None:
    known = base.model_type in ("llama", "mistral", "gpt2")
    return None if known else PeftCannot("Unsupported model type for adaption prompt")


def _not_layered(base: Base) -> Expectation | None:
    known = base.layers == "layers" or base.model_type == "bert"
    return None if known else PeftCannot("Could not locate the layers attribute")


def _own_heads(base: Base) -> Expectation | None:
    return PeftCannot("ModuleDict") if "head" in base.head else None  # it has a `head` of its own


METHODS = (
    method("LoHaConfig", "loha", no_conv1d),
    method("LoKrConfig", "lokr", no_conv1d),
    method("VeraConfig", "vera"),
    method("OFTConfig", "oft", no_conv1d, oft_block_size=4, r=0),
    method("BOFTConfig", "boft", no_conv1d, boft_block_size=4),
    method("AdaLoraConfig", "adalora", total_step=10),
    method("LNTuningConfig", "ln_tuning"),
    method("BeftConfig", "beft", no_conv1d),
    method("C3AConfig", "c3a", no_conv1d, block_size=8),
    method("DeftConfig", "deft"),
    method("DeloraConfig", "delora", no_conv1d),
    method("FourierFTConfig", "fourierft", n_frequency=16),
    method("FrodConfig", "frod", progressbar=False),
    method("GloraConfig", "glora", no_conv1d),
    method("GraloraConfig", "gralora"),
    method("HiraConfig", "hira"),
    method("HRAConfig", "hra", no_conv1d),
    method("LilyConfig", "lily", no_conv1d, stride_A=1, num_B=2),
    method("MissConfig", "miss", no_conv1d, r=4),
    method("OSFConfig", "osf"),
    method("PeanutConfig", "peanut", no_conv1d),
    method("PolyConfig", "poly", no_conv1d),
    method("PsoftConfig", "psoft", no_conv1d, r=4),
    method("PveraConfig", "pvera"),
    method("RandLoraConfig", "randlora", r=4),
    method("RoadConfig", "road", no_conv1d, group_size=8),
    method("ShadowConfig", "shadow", _own_heads),
    method("ShiraConfig", "shira", no_conv1d, r=4),
    method("SupertuningConfig", "supertuning", no_conv1d),
    method("TinyLoraConfig", "tinylora"),
    method("UniLoraConfig", "unilora"),
    method("VBLoRAConfig", "vblora", vector_length=8, num_vectors=16),
    method("WaveFTConfig", "waveft", n_frequency=16),
    Method("trainable_tokens", _trainable_tokens, Refused("peft_type 'TRAINABLE_TOKENS'")),
    Method("adaption_prompt", _adaption_prompt, Refused("peft_type 'ADAPTION_PROMPT'"),
           _unknown_to_adaption_prompt),
    prompt("PromptTuningConfig", "prompt_tuning"),
    prompt("MultitaskPromptTuningConfig", "multitask_prompt_tuning"),
    prompt("PrefixTuningConfig", "prefix_tuning"),
    prompt("PromptEncoderConfig", "p_tuning", encoder_hidden_size=16),
    prompt("CartridgeConfig", "cartridge"),
    feature("lora-invocation-tokens", "alora_invocation_tokens=", alora_invocation_tokens=[5, 6]),
    feature("lora-trainable-tokens", "trainable_token_indices=", trainable_token_indices=[5, 6]),
    feature("lora-velora", "velora_config=", velora_config=VeloraConfig()),
    feature("lora-monteclora", "monteclora_config=", monteclora_config=MontecloraConfig()),
    feature("lora-kasa", "kasa_config=", no_conv1d, kasa_config=KasaConfig()),
    feature("lora-block-diagonal", "use_bdlora=", no_conv1d, use_bdlora=lambda base: BdLoraConfig(
        target_modules_bd_a=[*base.attention], nblocks=2)),
    feature("lora-replicated-layers", "layer_replication=", _not_layered,
            layer_replication=[[0, 2], [1, 2]]),
)  # fmt: skip
