import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PretrainedConfig,
    RobertaConfig,
    RobertaModel,
)

from adapters.directory import Directory
from adapters.errors import AdapterRefused
from deployments.base import BaseName, BaseUnavailable
from deployments.model.engine import Engine
from deployments.rows import Row, Tokens

SMALL = {"vocab_size": 64, "initializer_range": 0.2}
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = BertConfig(**SMALL, **WIDTHS, intermediate_size=48, max_position_embeddings=40)
ROBERTA = RobertaConfig(
    **SMALL, **WIDTHS, intermediate_size=48, max_position_embeddings=42, pad_token_id=1
)
DISTILBERT = DistilBertConfig(
    **SMALL, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40
)

SaveBase = Callable[..., str]


def load(base: str) -> Engine:
    return Engine(base, quantization="none", device="cpu")


@pytest.mark.parametrize("name", ["no-such-folder", "/no/such/folder", "./no/such", "a/b/c"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_no_base(name: str) -> None:
    with pytest.raises(BaseUnavailable, match="is neither a folder nor a hub id") as caught:
        load(name)
    assert repr(name) in one_sentence(caught)


def test_a_hub_id_that_cannot_be_had_is_no_base() -> None:
    with pytest.raises(BaseUnavailable, match="cannot be loaded") as caught:
        load("nobody/has-this@main")
    assert "base_model='nobody/has-this@main'" in one_sentence(caught)


def test_a_folder_without_a_config_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(BaseUnavailable, match="cannot be loaded") as caught:
        load(str(tmp_path))
    assert str(tmp_path) in one_sentence(caught)


def test_a_folder_without_weights_is_no_base(tmp_path: Path) -> None:
    BERT.save_pretrained(tmp_path)
    with pytest.raises(BaseUnavailable, match="cannot be loaded") as caught:
        load(str(tmp_path))
    assert str(tmp_path) in one_sentence(caught)


def one_sentence(caught: pytest.ExceptionInfo[BaseUnavailable]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


def test_a_hub_id_may_name_a_revision_and_a_folder_is_one_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BaseName.parse("org/name@v1.0") == BaseName("org/name", "v1.0", "org/name")
    assert BaseName.parse("org/name") == BaseName("org/name", None, "org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert BaseName.parse("org/name") == BaseName(str(tmp_path / "org" / "name"), None, None)


@pytest.mark.parametrize(
    ("cls", "config", "longest"),
    [
        (BertModel, BERT, 40),
        (RobertaModel, ROBERTA, 40),  # 42, less the padding's id and the one before it
        (DistilBertModel, DISTILBERT, 40),
    ],
)
def test_the_longest_input_is_what_the_positions_leave(
    cls: type, config: PretrainedConfig, longest: int, save_base: SaveBase
) -> None:
    engine = load(save_base(cls, config))
    assert engine.encoder.max_positions == engine.encoder.geometry.max_positions == longest
    ids, mask = torch.full((1, longest), 5), torch.ones(1, longest, dtype=torch.int64)
    assert engine.encoder.forward(ids, mask, None, [0]).sequences.isfinite().all()
    longer, mask = torch.full((1, longest + 1), 5), torch.ones(1, longest + 1, dtype=torch.int64)
    with pytest.raises((IndexError, RuntimeError)):
        engine.encoder.forward(longer, mask, None, [0])


def test_a_pooler_that_the_checkpoint_lacks_is_part_of_the_head(
    tiny_base: str, save_base: SaveBase, make_adapter: Callable[..., PeftModel], tmp_path: Path
) -> None:
    base = save_base(BertModel, BERT, add_pooling_layer=False)
    engine, store = load(base), Directory(tmp_path)
    assert heads(engine) == ["bert.pooler.dense", "classifier"]
    assert heads(load(tiny_base)) == ["classifier"]

    make_adapter(tmp_path / "without", base, 3)
    with pytest.raises(AdapterRefused, match=r"no head weights: bert\.pooler\.dense\.weight"):
        engine.read(store.read("without"))
    make_adapter(tmp_path / "with", base, 3, saved=["pooler"])
    engine.read(store.read("with"))


def heads(engine: Engine) -> list[str]:
    return list(engine.encoder.geometry.graphs["SEQ_CLS"].heads)


@pytest.mark.parametrize(
    ("cls", "config", "kwargs", "saved", "targets"),
    [
        (BertModel, BERT, {"add_pooling_layer": False}, ["pooler"], ["query", "output.dense"]),
        (RobertaModel, ROBERTA, {"add_pooling_layer": False}, [], ["query", "value"]),
        (DistilBertModel, DISTILBERT, {}, ["pre_classifier"], ["q_lin", "ffn.lin1"]),
    ],
    ids=["bert-without-pooler", "roberta", "distilbert"],
)
def test_a_head_of_two_linears_is_answered_as_by_peft(
    cls: type,
    config: PretrainedConfig,
    kwargs: dict[str, bool],
    saved: list[str],
    targets: list[str],
    save_base: SaveBase,
    make_adapter: Callable[..., PeftModel],
    tmp_path: Path,
) -> None:
    base = save_base(cls, config, **kwargs)
    engine, store = load(base), Directory(tmp_path)
    assert len(heads(engine)) == 2
    pefts = {
        slot: make_adapter(
            tmp_path / f"task{slot}", base, slot + 2, targets=targets, saved=saved, seed=slot
        )
        for slot in (1, 2)
    }
    for slot in pefts:
        engine.write(slot, engine.read(store.read(f"task{slot}")))
    inputs = [list(range(2, 20)), [7, 8, 9], [60], list(range(40, 2, -1))]
    rows = [Row(1 + index % 2, Tokens(ids)) for index, ids in enumerate(inputs)]
    with torch.inference_mode():
        logits = engine.logits(rows)
        for row, got in zip(rows, logits, strict=True):
            want = pefts[row.slot](input_ids=torch.tensor([row.tokens.ids])).logits[0]
            assert (got[: row.slot + 2] - want).abs().max() <= 1e-4
            assert not got[row.slot + 2 :].any()


def test_a_checkpoint_without_its_embeddings_is_refused(tiny_base: str, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "word" not in n}, base / "model.safetensors")
    named = r"not made of linears and norms \(bert\.embeddings\.word_embeddings\.weight\)"
    with pytest.raises(BaseUnavailable, match=named):
        load(str(base))


def test_the_digest_is_that_of_the_file_of_weights(tiny_base: str) -> None:
    content = (Path(tiny_base) / "model.safetensors").read_bytes()
    assert load(tiny_base).encoder.sha256 == hashlib.sha256(content).hexdigest()
