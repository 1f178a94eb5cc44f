"""Makes a variant's adapter as training would leave it, saves it with PEFT, and reads it back."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.parity.bases import FIRST_PLAIN_ID, NUM_TRAINED_LABELS, VOCAB, Base
from tests.parity.expectations import Right
from tests.parity.variants import Variant


@dataclass(frozen=True)
class Made:
    """An adapter that PEFT saved.

    Attributes:
        folder: Where.
        num_labels: Of its answers.
        logits: What the model answered to `probe()` before it was saved; None where nobody asks.
        saved: Paths of the modules that it brings whole.
    """

    folder: Path
    num_labels: int
    logits: torch.Tensor | None
    saved: frozenset[str]


def make(base: Base, model_folder: str, variant: Variant, folder: Path, seed: int) -> Made:
    """Save a random adapter of a variant.

    Raises:
        Exception: Whatever PEFT raises where it cannot.
    """
    torch.manual_seed(seed)
    num_labels = NUM_TRAINED_LABELS if variant.form == "trained" else 2 + seed % 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice to whoever trains
        config = variant.config(base)
        model = load(model_folder, variant, num_labels)
        _prepare(model, config)
        peft = get_peft_model(model, config)
        first = folder.parent / f"{folder.name}-initial"
        if variant.convert:  # as PEFT's guide to PiSSA says
            said, config.init_lora_weights = config.init_lora_weights, True
            peft.save_pretrained(str(first))
            config.init_lora_weights = said
        shake(peft)
        logits = None
        if isinstance(variant.expectation(base), Right):
            logits = answer(peft.eval(), probe())
        more = {"path_initial_model_for_weight_conversion": str(first)} if variant.convert else {}
        peft.save_pretrained(str(folder), **more)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | variant.claims))
    names = [n for n in load_file(folder / "adapter_model.safetensors") if n.endswith(".weight")]
    paths = {name.removeprefix("base_model.model.").rpartition(".")[0] for name in names}
    return Made(folder, num_labels, logits, frozenset(p for p in paths if "lora_" not in p))


def _prepare(model: nn.Module, config: PeftConfig) -> None:
    """Look at activations or gradients, where an initialisation is made from them."""
    init = getattr(config, "init_lora_weights", None)
    if init == "corda":
        preprocess_corda(model, config, run_model=lambda: model(probe()))
    elif init == "lora_ga":
        preprocess_loraga(model, config, lambda: model(probe()).logits.square().sum().backward())


def load(model_folder: str, variant: Variant, num_labels: int) -> nn.Module:
    """The base with a new head, or with the one that it was trained with."""
    of_tokens = variant.of_tokens
    cls = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    return cls.from_pretrained(model_folder, num_labels=num_labels).eval()


def reload(model: nn.Module, made: Made) -> PeftModel:
    """The adapter alone over a base of its own, as whoever downloads it would load it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, str(made.folder)).eval().requires_grad_(False)


@torch.no_grad()
def shake(peft: PeftModel) -> None:
    """Move every weight that is trained to where training might have left it."""
    for name, weight in peft.named_parameters():
        if not weight.requires_grad or not weight.is_floating_point():
            continue
        noise = torch.randn_like(weight)
        if "lora_magnitude_vector" in name or "ia3_l" in name:
            weight.mul_(1 + 0.3 * noise.clamp(-2, 2))
        elif any(part in name for part in ("lora_B", "lora_embedding_A")):
            # PEFT starts these with zeros, so that an adapter that was never trained adds nothing.
            weight.add_(noise, alpha=0.1)
        elif "modules_to_save" in name and weight.ndim == 2:
            weight.copy_(0.3 * noise)
        else:
            weight.add_(noise, alpha=0.1)


def probe() -> torch.Tensor:
    """Ids [rows, tokens] without padding, the same at every call."""
    dice = torch.Generator().manual_seed(1)
    return torch.randint(FIRST_PLAIN_ID, VOCAB, (1, 12), generator=dice)


def answer(peft: PeftModel, ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = peft(input_ids=ids, **more).logits
    return logits


def without_tuners(peft: PeftModel) -> None:
    """Switch the low-rank parts and the like off, and leave the head as it is trained."""
    for module in peft.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
