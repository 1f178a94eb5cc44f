"""Tokenizers as transformers saves them beside an adapter, against the base that is served."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from tokenizers import AddedToken
from transformers import AutoTokenizer

from adapters.directory import Directory
from adapters.errors import AdapterRefused
from adapters.store import Files
from deployments.model.engine import Engine
from deployments.model.facts import to_facts


@pytest.fixture
def engine(example_engine: Callable[[str], Engine]) -> Engine:
    return example_engine("none")


@pytest.fixture
def beside(example_base: str, example_store: Directory, tmp_path: Path) -> Callable[..., Files]:
    """Reads the example's sentiment with a tokenizer saved beside it, without its task.json."""

    def beside(change: Callable[[Any], Any] = lambda tokenizer: None, **loading: Any) -> Files:
        folder = tmp_path / "sentiment"
        shutil.copytree(example_store.root / "sentiment", folder)
        (folder / "task.json").unlink()
        tokenizer = AutoTokenizer.from_pretrained(example_base, **loading)
        change(tokenizer)
        tokenizer.save_pretrained(str(folder))
        return Directory(tmp_path).read("sentiment")

    return beside


def test_the_tokenizer_of_a_training_is_the_bases_and_tells_its_length(
    engine: Engine, beside: Callable[..., Files]
) -> None:
    train = lambda tokenizer: tokenizer(["a b"] * 2, truncation=True, max_length=77, padding=True)  # noqa: E731
    files = beside(train)
    assert json.loads(files.contents["tokenizer.json"])["truncation"]["max_length"] == 77
    facts = to_facts(engine.read(files).artifact, max_length=512)
    assert facts["max_length"] == 77
    assert facts["guessed"] == ["labels", "problem_type"]


def test_a_lowered_limit_tells_the_length_too(engine: Engine, beside: Callable[..., Files]) -> None:
    files = beside(lambda tokenizer: tokenizer(["a"]), model_max_length=99)
    assert to_facts(engine.read(files).artifact, max_length=512)["max_length"] == 99


def test_without_a_length_it_is_guessed(engine: Engine, beside: Callable[..., Files]) -> None:
    facts = to_facts(engine.read(beside(lambda tokenizer: tokenizer(["a"]))).artifact, 512)
    assert facts["max_length"] == 512
    assert "max_length" in facts["guessed"]


@pytest.mark.parametrize(
    ("change", "loading", "said"),
    [
        (lambda t: t.add_tokens(["<who>", "<what>"]), {}, "2 tokens that the base's has not (<wh"),
        (
            lambda t: t.add_special_tokens({"additional_special_tokens": [AddedToken("<x>")]}),
            {},
            "(<x>)",
        ),
        (lambda t: None, {"do_lower_case": False}, "normalizer"),
        (lambda t: None, {"truncation_side": "left"}, "on the left, the base's on the right"),
        (lambda t: None, {"split_special_tokens": True}, "split_special_tokens is true"),
    ],
)
def test_another_tokenizer_is_refused(
    engine: Engine,
    beside: Callable[..., Files],
    change: Callable[[Any], Any],
    loading: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(AdapterRefused) as caught:
        engine.read(beside(change, **loading))
    assert said in str(caught.value)


def test_a_base_without_a_tokenizer_compares_none(
    tiny_base: str, make_adapter: Callable[..., PeftModel], tmp_path: Path
) -> None:
    engine = Engine(tiny_base, quantization="none", device="cpu")
    assert engine.geometry.tokenizer is None
    make_adapter(tmp_path / "task", tiny_base, 2)
    (tmp_path / "task" / "tokenizer.json").write_text('{"model": {"type": "odd"}}')
    assert engine.read(Directory(tmp_path).read("task")).artifact.num_labels == 2
