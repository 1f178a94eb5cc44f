"""Heads: brought, lent by the base, changed by LoRA, of sequences and of tokens."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
)

from adapters.directory import Directory
from adapters.errors import AdapterRefused
from adapters.store import WEIGHTS
from deployments.model.engine import Engine
from deployments.rows import Prediction, Row, Tokens

NUM_LABELS = 3  # of the heads that the bases bring
BERT = BertConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=48, max_position_embeddings=40, initializer_range=0.2,
    num_labels=NUM_LABELS,
)  # fmt: skip
LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "initializer_range": 0.2,
}  # fmt: skip
INPUTS = [list(range(2, 20)), [7, 8, 9], [60], list(range(40, 2, -1))]
TOLERANCE = 2e-4

SaveBase = Callable[..., str]


def make(folder: Path, base: str, num_labels: int = NUM_LABELS, **config: object) -> PeftModel:
    """Saves a random adapter as PEFT does, and returns PEFT's own model of it."""
    torch.manual_seed(len(folder.name))
    of_tokens = config.get("task_type") == TaskType.TOKEN_CLS
    cls = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    model = cls.from_pretrained(base, num_labels=num_labels, ignore_mismatched_sizes=True)
    settings = {"target_modules": ["query"], "r": 4} | config
    peft = get_peft_model(model, LoraConfig(**settings)).eval().requires_grad_(False)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.normal_(std=0.2)
    peft.save_pretrained(str(folder))
    return peft


def load(base: str, **kwargs: object) -> Engine:
    return Engine(base, quantization="none", device="cpu", **kwargs)


def answer(engine: Engine, slot: int, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return engine.logits([Row(slot, Tokens(ids))])[0]


def want(peft: PeftModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return peft(input_ids=torch.tensor([ids])).logits[0]


def test_rows_of_sequences_and_of_tokens_share_a_batch(tiny_base: str, tmp_path: Path) -> None:
    pefts = {
        1: make(tmp_path / "tokens", tiny_base, 5, task_type=TaskType.TOKEN_CLS),
        2: make(tmp_path / "texts", tiny_base, 2, task_type=TaskType.SEQ_CLS),
        3: make(tmp_path / "spans", tiny_base, 3, task_type=TaskType.TOKEN_CLS),
    }
    engine, store = load(tiny_base), Directory(tmp_path)
    for slot, task in enumerate(("tokens", "texts", "spans"), start=1):
        engine.write(slot, engine.read(store.read(task)))
    rows = [Row(slot, Tokens(ids)) for ids in INPUTS for slot in (2, 1, 3)]
    answers = engine.predict(rows)
    for row, got in zip(rows, answers, strict=True):
        assert isinstance(got, Prediction)
        expected = want(pefts[row.slot], row.tokens.ids)
        assert (torch.tensor(got.logits) - expected).abs().max() <= TOLERANCE
        assert (torch.tensor(got.scores) - expected.softmax(-1)).abs().max() <= TOLERANCE


def test_an_adapter_without_a_head_uses_the_base_s(save_base: SaveBase, tmp_path: Path) -> None:
    base = save_base(BertForSequenceClassification, BERT)
    peft = make(tmp_path / "headless", base)
    stored = load_file(tmp_path / "headless" / WEIGHTS)
    assert not [name for name in stored if "classifier" in name]
    engine = load(base)
    engine.write(1, engine.read(Directory(tmp_path).read("headless")))
    for ids in INPUTS:
        assert (answer(engine, 1, ids)[:NUM_LABELS] - want(peft, ids)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("dora", [False, True])
def test_lora_on_the_head_changes_the_base_s(
    save_base: SaveBase, tmp_path: Path, dora: bool
) -> None:
    base = save_base(BertForSequenceClassification, BERT)
    peft = make(tmp_path / "head", base, target_modules=["query", "classifier"], use_dora=dora)
    engine = load(base)
    engine.write(1, engine.read(Directory(tmp_path).read("head")))
    for ids in INPUTS:
        assert (answer(engine, 1, ids)[:NUM_LABELS] - want(peft, ids)).abs().max() <= TOLERANCE


def test_a_head_that_is_promised_is_never_the_base_s(save_base: SaveBase, tmp_path: Path) -> None:
    base = save_base(BertForSequenceClassification, BERT)
    make(tmp_path / "torn", base, task_type=TaskType.SEQ_CLS)
    file = tmp_path / "torn" / WEIGHTS
    save_file({n: t for n, t in load_file(file).items() if "classifier" not in n}, file)
    with pytest.raises(AdapterRefused, match=r"no head weights: classifier\.weight, classifier\.b"):
        load(base).read(Directory(tmp_path).read("torn"))


def test_a_head_for_tokens_is_no_head_for_sequences(save_base: SaveBase, tmp_path: Path) -> None:
    base = save_base(BertForTokenClassification, BERT)
    make(tmp_path / "texts", base)
    engine, store = load(base), Directory(tmp_path)
    with pytest.raises(AdapterRefused, match=r"no head weights: .*classifier\.weight"):
        engine.read(store.read("texts"))
    peft = make(tmp_path / "tokens", base, task_type=TaskType.TOKEN_CLS, modules_to_save=[])
    file = tmp_path / "tokens" / WEIGHTS
    save_file({n: t for n, t in load_file(file).items() if "classifier" not in n}, file)
    config = tmp_path / "tokens" / "adapter_config.json"
    config.write_text(config.read_text().replace('"classifier"', '"nothing"'))
    engine.write(1, engine.read(store.read("tokens")))
    base_s = AutoModelForTokenClassification.from_pretrained(base)
    for part in ("weight", "bias"):
        own = getattr(base_s.classifier, part).data
        getattr(peft.base_model.model.classifier.modules_to_save["default"], part).data.copy_(own)
    for ids in INPUTS:
        assert (answer(engine, 1, ids)[:, :NUM_LABELS] - want(peft, ids)).abs().max() <= TOLERANCE


def test_a_pooler_that_an_adapter_brings_is_its_own(tiny_base: str, tmp_path: Path) -> None:
    pooled = {"task_type": TaskType.SEQ_CLS, "modules_to_save": ["pooler"]}
    pefts = {
        1: make(tmp_path / "pooler", tiny_base, **pooled),
        2: make(tmp_path / "plain", tiny_base, task_type=TaskType.SEQ_CLS),
        3: make(tmp_path / "adapted", tiny_base, 4, target_modules=["query", "pooler.dense"],
                task_type=TaskType.SEQ_CLS),
    }  # fmt: skip
    store = Directory(tmp_path)
    engine = load(tiny_base)
    for slot, task in enumerate(("pooler", "plain", "adapted"), start=1):
        engine.write(slot, engine.read(store.read(task)))
    for slot, peft in pefts.items():
        for ids in INPUTS:
            expected = want(peft, ids)
            assert (answer(engine, slot, ids)[: len(expected)] - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved", ["output.LayerNorm", "layer.1", "pooler"])
def test_modules_of_the_encoder_may_be_an_adapter_s_own_beside_one_that_has_none(
    tiny_base: str, tmp_path: Path, saved: str, dtype: torch.dtype
) -> None:
    seq = {"task_type": TaskType.SEQ_CLS, "target_modules": ["0.attention.self.query"]}
    pefts = {
        1: make(tmp_path / "own", tiny_base, modules_to_save=[saved], **seq),
        2: make(tmp_path / "plain", tiny_base, **seq),
    }
    store = Directory(tmp_path)
    engine = load(tiny_base, dtype=dtype)
    for slot, task in enumerate(("own", "plain"), start=1):
        engine.write(slot, engine.read(store.read(task)))
    rows = [Row(slot, Tokens(ids)) for ids in INPUTS for slot in pefts]
    with torch.inference_mode():
        logits = engine.logits(rows)
    tolerance = TOLERANCE if dtype == torch.float32 else 0.2
    for row, got in zip(rows, logits, strict=True):
        expected = want(pefts[row.slot], row.tokens.ids)
        assert (got[:NUM_LABELS] - expected).abs().max() <= tolerance
    assert (logits[0::2] - logits[1::2]).abs().max() > 2 * tolerance


def test_what_cannot_be_brought_whole_is_refused_by_name(
    save_base: SaveBase, tmp_path: Path
) -> None:
    small = {"vocab_size": 64, "pad_token_id": 0}
    gpt2 = save_base(GPT2Model, GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=40, **small))
    make(tmp_path / "conv", gpt2, task_type=TaskType.SEQ_CLS, target_modules=["c_attn"],
         modules_to_save=["mlp.c_proj"], fan_in_fan_out=True)  # fmt: skip
    with pytest.raises(AdapterRefused, match=r"mlp\.c_proj is brought whole, as only linears and"):
        load(gpt2).read(Directory(tmp_path).read("conv"))
    llama = save_base(LlamaModel, LlamaConfig(**small, **LLAMA))
    make(tmp_path / "norm", llama, task_type=TaskType.SEQ_CLS, target_modules=["q_proj"],
         modules_to_save=["norm"])  # fmt: skip
    with pytest.raises(AdapterRefused, match=r"model\.norm is brought whole, as only linears and"):
        load(llama).read(Directory(tmp_path).read("norm"))


@pytest.mark.parametrize("pad_id", [-1, None, 7])
def test_any_pad_id_pads_rows_of_several_lengths(
    save_base: SaveBase, tmp_path: Path, pad_id: int | None
) -> None:
    base = save_base(LlamaModel, LlamaConfig(vocab_size=64, pad_token_id=0, **LLAMA))
    config = Path(base) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token_id": pad_id}))
    peft = make(
        tmp_path / "task", base, task_type=TaskType.SEQ_CLS, target_modules=["q_proj", "v_proj"]
    )
    engine = load(base)
    engine.write(1, engine.read(Directory(tmp_path).read("task")))
    with torch.inference_mode():
        logits = engine.logits([Row(1, Tokens(ids)) for ids in INPUTS])
    for ids, got in zip(INPUTS, logits, strict=True):
        assert (got[:NUM_LABELS] - want(peft, ids)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_of_the_embedding_is_known_in_any_dtype(
    tiny_base: str, tmp_path: Path, dtype: torch.dtype
) -> None:
    make(tmp_path / "whole", tiny_base, task_type=TaskType.SEQ_CLS)
    file = tmp_path / "whole" / WEIGHTS
    own = BertModel.from_pretrained(tiny_base).embeddings.word_embeddings.weight.data
    name = "base_model.model.bert.embeddings.word_embeddings.weight"
    save_file(load_file(file) | {name: own.clone()}, file)
    load(tiny_base, dtype=dtype).read(Directory(tmp_path).read("whole"))


def test_a_whole_embedding_is_taken_only_if_it_is_the_base_s(
    tiny_base: str, tmp_path: Path
) -> None:
    make(tmp_path / "whole", tiny_base, task_type=TaskType.SEQ_CLS)
    file = tmp_path / "whole" / WEIGHTS
    own = BertModel.from_pretrained(tiny_base).embeddings.word_embeddings.weight.data
    name = "base_model.model.bert.embeddings.word_embeddings.weight"
    engine, store, stored = load(tiny_base), Directory(tmp_path), load_file(file)
    save_file(stored | {name: own.clone()}, file)
    engine.read(store.read("whole"))
    save_file(stored | {name: own + 1e-3}, file)
    with pytest.raises(AdapterRefused, match="whole embeddings are not served"):
        engine.read(store.read("whole"))
    save_file(stored | {name: torch.cat([own, own[:2]])}, file)
    with pytest.raises(AdapterRefused, match="resized to 66 tokens, the base has 64"):
        engine.read(store.read("whole"))


def test_a_base_that_is_quantised_already_is_served_as_it_is(
    tiny_base: str, tmp_path: Path
) -> None:
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["pooler"],
    )  # fmt: skip
    base = str(tmp_path / "base")
    BertModel.from_pretrained(tiny_base, quantization_config=quantised).save_pretrained(base)
    # PEFT must be told what the engine finds out: which modules are not quantised.
    config = Path(base) / "config.json"
    said = config.read_text()
    config.write_text(said.replace('"pooler"', '"bert.pooler", "classifier"'))
    peft = make(tmp_path / "store" / "task", base, task_type=TaskType.SEQ_CLS)
    config.write_text(said)
    for module in peft.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # see deployments.model.quantize
    engine = load(base)
    engine.write(1, engine.read(Directory(tmp_path / "store").read("task")))
    kinds = {type(module).__name__ for module in engine.encoder.model.modules()}
    assert "Linear4bit" in kinds
    for ids in INPUTS:
        assert (answer(engine, 1, ids)[:NUM_LABELS] - want(peft, ids)).abs().max() <= TOLERANCE
