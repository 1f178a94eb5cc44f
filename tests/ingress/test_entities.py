"""transformers' own pipeline is the oracle: its class, driven with the same scores."""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    TokenClassificationPipeline,
)
from transformers.modeling_outputs import TokenClassifierOutput

from adapters.rules import Aggregation
from deployments.ingress.entities import find_entities
from deployments.ingress.windows import Piece, stitch
from deployments.model.vocabulary import export_vocabulary
from deployments.spans import Span
from deployments.tokens import Tokenizer

BASE = Path(__file__).parents[2] / "examples" / "base"
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
SCHEMES = {
    "bio": ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"),
    "plain": ("O", "PER", "ORG"),
    "odd": ("B-", "I-x-y", "B-x-y", "x-y", "X-O", "b-PER", "B-PER", "O"),
}
TEXTS = [
    "My name is Sarah and I live in London.", "Jean-Baptiste Übergrößen à Montréal, unaffable!",
    "👩‍👩‍👧 works for 東京都 (한국어) at Ubuntu-Linux; שלום עולם مرحبا",
    "tokenization untokenizable re-tokenising",
    "e\u0301 \u0301cole ﬁne ½ İstanbul Z͑ͫ", "[SEP] and [CLS]no[MASK]space", "a\0b\0\0 \ufffd\ufffd",
    "", " ", "  two  spaces\tand\ntabs ", "x" * 300, "3.14 1,000 http://x.test/?q=1",
]  # fmt: skip


def byte_level() -> PreTrainedTokenizerFast:
    """RoBERTa's kind, whose tokens do not say where a word begins."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>", "<pad>", "<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", model_max_length=512,
    )  # fmt: skip


@dataclass(frozen=True)
class Both:
    """The pipeline and ours, over one tokenizer."""

    theirs: Any
    ours: Tokenizer


@cache
def both(kind: str) -> Both:
    theirs = AutoTokenizer.from_pretrained(str(BASE)) if kind == "bert" else byte_level()
    backend = Backend.from_str(theirs.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return Both(
        theirs,
        Tokenizer(
            {
                "backend": backend.to_str(),
                "max_length": 512,
                "truncation_side": "right",
                "split_special_tokens": False,
                "type_ids": kind == "bert",
                "unk_id": theirs.unk_token_id,
            }
        ),
    )


@cache
def pipeline(kind: str, labels: tuple[str, ...]) -> Any:
    """The pipeline over a tiny model; `told` is what its model says, whatever it reads."""
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        id2label=dict(enumerate(labels)), label2id={name: n for n, name in enumerate(labels)},
    )  # fmt: skip
    model: Any = BertForTokenClassification(config)
    pipeline: Any = TokenClassificationPipeline(model=model, tokenizer=both(kind).theirs)
    model.forward = lambda **_: TokenClassifierOutput(logits=pipeline.told)
    return pipeline


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["bert", "byte level"])
def test_entities_are_the_pipeline_s(kind: str, scheme: str, aggregation: Aggregation) -> None:
    labels = SCHEMES[scheme]
    oracle, ours = pipeline(kind, labels), both(kind).ours
    chance = torch.Generator().manual_seed(0)
    found = 0
    for text in TEXTS:
        (encoded,) = ours.encode([text], 512, spans=True)
        for sharpness in (0.05, 4.0):
            for _ in range(2):
                shape = (1, len(encoded.tokens.ids), len(labels))
                logits = torch.randn(shape, generator=chance) * sharpness
                oracle.told = logits
                expected = oracle(text, aggregation_strategy=aggregation, ignore_labels=["O"])
                pieces = stitch([encoded], [logits[0].softmax(1).tolist()])
                entities = find_entities(pieces, labels, aggregation)
                name = "entity" if aggregation == "none" else "entity_group"
                assert [(e.label, e.start, e.end) for e in entities] == [
                    (e[name], e["start"], e["end"]) for e in expected
                ]
                assert [e.score for e in entities] == pytest.approx(
                    [float(e["score"]) for e in expected], abs=1e-6
                )
                found += len(entities)
    assert found > 100


def test_ties_go_to_the_label_and_the_token_that_come_first() -> None:
    labels = ("B-A", "B-B")
    word = [Piece(Span(0, 1, False), [0.5, 0.5]), Piece(Span(1, 2, True), [0.5, 0.5])]
    for aggregation in AGGREGATIONS:
        first = find_entities(word, labels, aggregation)[0]
        assert first.label == ("B-A" if aggregation == "none" else "A")
    (entity,) = find_entities(
        [word[0]._replace(scores=[0.2, 0.8]), word[1]._replace(scores=[0.8, 0.2])], labels, "max"
    )
    assert entity == ("B", 0.8, 0, 2)


def test_spans_count_the_caller_s_characters() -> None:
    text = "👩‍👩‍👧 東京 Übergrößen  e\u0301cole"
    (encoded,) = both("bert").ours.encode([text], 512, spans=True)
    spans = encoded.spans
    assert spans is not None
    assert spans[0] is spans[-1] is None
    whole = [text[span.start : span.end] for span in spans if span is not None]
    assert whole == ["👩‍👩‍👧", "東", "京", "Über", "gr", "ö", "ße", "n", "e\u0301cole"]


@pytest.mark.parametrize("stride", [0, 1, 5, 9])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_token_is_read_where_most_stands_on_both_sides_of_it(stride: int, side: str) -> None:
    text = " ".join(f"word{n}" for n in range(40))
    vocabulary = {**export_vocabulary_of_base(), "truncation_side": side}
    ours = Tokenizer(vocabulary)
    (whole,) = ours.encode([text], 512, spans=True)
    windows = (
        ours.windows([text], 12, stride, "longest_first", max_windows=999, spans=True) or [[]]
    )[0]
    # Every window says its own number of each of its tokens.
    scores = [[[float(n)]] * len(window.tokens.ids) for n, window in enumerate(windows)]
    pieces = stitch(windows, scores)
    assert [piece.span for piece in pieces] == [s for s in whole.spans or [] if s is not None]
    for place, piece in enumerate(pieces):
        context = [
            min(place - window.first, window.first + len(window.tokens.ids) - 3 - place)
            for window in windows
        ]
        assert context[int(piece.scores[0])] == max(context) >= 0


@cache
def export_vocabulary_of_base() -> dict[str, Any]:
    from types import SimpleNamespace

    from deployments.base import BaseName

    stand_in: Any = SimpleNamespace(base=BaseName.parse(str(BASE)), max_positions=512)
    return dict(export_vocabulary(stand_in))


def test_a_long_text_s_entities_are_those_of_its_tokens_whatever_the_window() -> None:
    labels = SCHEMES["bio"]
    text = " ".join(random.Random(0).choices(["Sarah", "unaffable", "London", "of"], k=120))
    ours = both("bert").ours
    (whole,) = ours.encode([text], 512, spans=True)
    (windows,) = ours.windows([text], 24, 6, "longest_first", max_windows=99, spans=True) or [[]]
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(len(labels)), len(whole.tokens.ids) - 2).tolist()
    nothing = [0.0] * len(labels)
    parts = [
        [nothing, *scores[w.first : w.first + len(w.tokens.ids) - 2], nothing] for w in windows
    ]
    assert len(windows) > 5
    for aggregation in AGGREGATIONS:
        expected = find_entities(
            stitch([whole], [[nothing, *scores, nothing]]), labels, aggregation
        )
        assert find_entities(stitch(windows, parts), labels, aggregation) == expected


@given(st.text(max_size=60), st.sampled_from(["bert", "byte level"]), st.integers(0, 99))
@settings(max_examples=60)
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_words_of_any_text_are_the_pipeline_s(text: str, kind: str, seed: int) -> None:
    labels = SCHEMES["bio"]
    oracle, ours = pipeline(kind, labels), both(kind).ours
    (encoded,) = ours.encode([text], 512, spans=True)
    chance = torch.Generator().manual_seed(seed)
    oracle.told = torch.randn((1, len(encoded.tokens.ids), len(labels)), generator=chance)
    expected = oracle(text, aggregation_strategy="first", ignore_labels=["O"])
    pieces = stitch([encoded], [oracle.told[0].softmax(1).tolist()])
    assert [(e.label, e.start, e.end) for e in find_entities(pieces, labels, "first")] == [
        (e["entity_group"], e["start"], e["end"]) for e in expected
    ]
