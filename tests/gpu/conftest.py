from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from adapters.directory import Directory
from deployments.model.engine import Engine

NUM_SLOTS = 5
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT-tiny in `base` (2 layers, 128 wide), and adapters `store/task1`, …."""
    folder = tmp_path_factory.mktemp("gpu")
    config = BertConfig(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=128,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder / "base")
    for slot in range(1, 1 + NUM_SLOTS):
        model = AutoModelForSequenceClassification.from_pretrained(
            folder / "base", num_labels=1 + slot
        )
        lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, target_modules=["query", "value"])
        peft = get_peft_model(model, lora)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        peft.save_pretrained(folder / "store" / f"task{slot}")
    return folder


@pytest.fixture
def make_engine(folder: Path) -> Callable[[str], Engine]:
    """Returns an engine on the GPU of a quantisation, all adapters in their slots."""

    def make(quantization: str) -> Engine:
        engine = Engine(
            str(folder / "base"), quantization=quantization, device="cuda", bank_bytes=2**26
        )
        for slot in range(1, 1 + NUM_SLOTS):
            engine.write(slot, engine.read(Directory(folder / "store").read(f"task{slot}")))
        return engine

    return make
