"""In bf16 the engine is as near to the fp32 answer as PEFT in bf16 is, its head being in fp32."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification

from adapters.directory import Directory
from deployments.model.engine import Engine
from deployments.rows import Row, Tokens
from tests.parity.bases import BASES, FIRST_PLAIN_ID, VOCAB, Base

NUM_LABELS = 3
NAMES = ("bert", "roberta", "deberta-v3", "modernbert", "qwen2")


@pytest.mark.parametrize(
    "base", [base for base in BASES if base.name in NAMES], ids=lambda base: base.name
)
def test_bf16_costs_no_more_than_in_peft(base: Base, tmp_path: Path) -> None:
    folder = base.save("bare", tmp_path / "base")
    saved = ["classifier", "score", *base.head]
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=4, target_modules=[*base.attention], modules_to_save=saved
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=NUM_LABELS)
    made = get_peft_model(model, config)
    for name, parameter in made.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(tmp_path / "store" / "task")

    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randint(FIRST_PLAIN_ID, VOCAB, (length,), generator=generator).tolist()
        for length in (3, 40, 17, 8, 29, 12, 33, 21)
    ]
    exact, theirs = (peft(folder, tmp_path, inputs, dtype) for dtype in (None, torch.bfloat16))
    engine = Engine(folder, quantization="none", device="cpu", dtype=torch.bfloat16)
    engine.write(1, engine.read(Directory(tmp_path / "store").read("task")))
    with torch.inference_mode():
        ours = engine.logits([Row(1, Tokens(ids)) for ids in inputs])
    assert ours.dtype == torch.float32
    our_error = (ours[:, :NUM_LABELS] - exact).abs()
    their_error = (theirs - exact).abs()
    assert their_error.mean() > 1e-4, "so small that it shows nothing"
    assert our_error.mean() <= 1.25 * their_error.mean()
    assert our_error.max() <= 2 * their_error.max()


def peft(
    folder: str, root: Path, inputs: list[list[int]], dtype: torch.dtype | None
) -> torch.Tensor:
    """PEFT's logits of each row alone, [rows, labels], fp32."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=NUM_LABELS, dtype=dtype or torch.float32
    )
    model = PeftModel.from_pretrained(model, str(root / "store" / "task")).eval()
    with torch.inference_mode():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits.float() for ids in inputs])
