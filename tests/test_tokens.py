import random
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deployments.base import BaseName, BaseUnavailable
from deployments.model.vocabulary import PAGE_BYTES, export_vocabulary, to_pages
from deployments.rows import Tokens
from deployments.tokens import Input, Tokenizer, Vocabulary

BASE = Path(__file__).parents[1] / "examples" / "base"
STRATEGIES = ("longest_first", "only_first", "only_second", None)

TEXTS = [
    "", " ", "\t\r\n \u00a0\u2003", "I absolutely loved this product!", "unaffable Übergrößen",
    "👩‍👩‍👧 🇩🇪 👍🏽 ok", "שלום עולם مرحبا بالعالم", "\u202eright\u202c to left\u200f",
    "a\0b\0\0", "e\u0301 \u0301 q\u0307\u0323 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚", "[SEP] and [CLS]", "[CLS][SEP][PAD][MASK][UNK]",
    "no[SEP]space [sep] ##ing", "<|endoftext|> </s>", "東京は日本の首都です。中文 한국어 ไทย हिन्दी",
    "mixed Кириллица ελληνικά 日本 עברית 123", "http://x.test/?q=1&r=%20#top", "x" * 3000,
    "word " * 700, "👍" * 400, "\ufeffbom \ufffd \u0378 \U0010ffff", "ﬁne ½ ② Ⅷ",
    "don't — “quote”…",
    "1234567890 3.14 1,000", "\x01\x02\x7f\x80\x9f",
]  # fmt: skip
PAIRS = [
    ("the food was good", "what of the food?"), ("", ""), ("", "only the second"),
    ("only the first", ""), ("word " * 300, "short"), ("short", "word " * 300),
    ("one two three " * 60, "four five six " * 60), ("a [SEP] b", "[CLS]"), ("👍", "\0"),
]  # fmt: skip


@dataclass(frozen=True)
class Both:
    """AutoTokenizer of a base, and ours made of what it exports."""

    oracle: Any
    vocabulary: Vocabulary
    ours: Tokenizer

    def expected(self, text: Input, max_length: int, strategy: str | None) -> Tokens | None:
        """What AutoTokenizer gives, None where it cannot cut."""
        # As batches of one: given a lone pair, it takes an empty second text for none.
        parts = [[text]] if isinstance(text, str) else [[part] for part in text]
        try:
            out = self.oracle(*parts, truncation=strategy or False, max_length=max_length)
        except Exception:
            return None
        (types,) = out.get("token_type_ids", [None])
        return Tokens(out["input_ids"][0], types if types and any(types) else None)

    def check(self, text: Input, max_length: int, strategy: str | None) -> None:
        whole = self.expected(text, max_length, None)
        expected = self.expected(text, max_length, strategy)
        assert whole is not None
        if expected is None:
            with pytest.raises(ValueError, match=f"cannot be cut to {max_length} tokens"):
                self.ours.encode([text], max_length, strategy)
            return
        (encoded,) = self.ours.encode([text], max_length, strategy)
        assert encoded.tokens == expected, (text, max_length, strategy)
        assert encoded.num_tokens == len(whole.ids)
        assert encoded.truncated == (len(expected.ids) < len(whole.ids))


def stand_in(base: Path, max_positions: int | None = 512) -> Any:
    """All of an encoder that its vocabulary depends on."""
    return SimpleNamespace(base=BaseName.parse(str(base)), max_positions=max_positions)


def both(base: Path) -> Both:
    vocabulary = export_vocabulary(stand_in(base))
    return Both(AutoTokenizer.from_pretrained(str(base)), vocabulary, Tokenizer(vocabulary))


def byte_level(folder: Path, *, like: str) -> Path:
    """Train a small byte-level BPE, save it as a base's: RoBERTa's, or GPT-2's cut at the left."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([text[:200] for text in TEXTS], trainer)
    backend.post_processor = {
        "roberta": processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
        "gpt2": processors.ByteLevel(trim_offsets=False),  # adds no special tokens
    }[like]
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=128,
        truncation_side="left" if like == "gpt2" else "right",
    ).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Both]:
    @cache
    def make(kind: str) -> Both:
        if kind == "example":
            return both(BASE)
        folder = tmp_path_factory.mktemp("tokenizer")
        if kind == "example, split":
            AutoTokenizer.from_pretrained(
                str(BASE), split_special_tokens=True, truncation_side="left"
            ).save_pretrained(str(folder))
            return both(folder)
        return both(byte_level(folder, like=kind))

    return make


KINDS = ["example", "example, split", "roberta", "gpt2"]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, made: Callable[[str], Both]) -> Both:
    return made(request.param)


@pytest.mark.parametrize("max_length", [1, 3, 5, 16, 128, 512])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_odd_texts_and_pairs_become_autotokenizer_s_ids(
    pair: Both, strategy: str | None, max_length: int
) -> None:
    for text in [*TEXTS, *PAIRS]:
        pair.check(text, max_length, strategy)


def test_what_the_kinds_differ_in_is_exported(made: Callable[[str], Both]) -> None:
    exported = [made(kind).vocabulary for kind in KINDS]
    assert [v["truncation_side"] for v in exported] == ["right", "left", "right", "left"]
    assert [v["split_special_tokens"] for v in exported] == [False, True, False, False]
    assert [v["max_length"] for v in exported] == [512, 512, 128, 128]
    assert exported[0]["type_ids"]


@given(st.text(max_size=200), st.sampled_from([3, 7, 32, 512]))
def test_any_text_becomes_autotokenizer_s_ids(
    made: Callable[[str], Both], text: str, max_length: int
) -> None:
    for kind in ("example", "roberta"):
        made(kind).check(text, max_length, "longest_first")


@given(
    st.tuples(st.text(max_size=40), st.text(max_size=40)),
    st.sampled_from([3, 5, 8, 20, 512]),
    st.sampled_from(STRATEGIES),
)
def test_any_pair_becomes_autotokenizer_s_ids(
    made: Callable[[str], Both], texts: tuple[str, str], max_length: int, strategy: str | None
) -> None:
    made("example").check(texts, max_length, strategy)


def test_the_base_s_own_truncation_and_padding_to_128_are_gone(
    made: Callable[[str], Both],
) -> None:
    baked = orjson.loads((BASE / "tokenizer.json").read_bytes())
    assert baked["truncation"]["max_length"] == baked["padding"]["strategy"]["Fixed"] == 128
    ours = made("example").ours
    short, long = ours.encode(["hi", "word " * 300], 512)
    assert len(short.tokens.ids) == 3
    assert len(long.tokens.ids) == 302
    assert not long.truncated


def test_a_batch_is_its_texts_one_by_one(pair: Both) -> None:
    texts = TEXTS * 2
    encoded = pair.ours.encode(texts, 16)
    assert encoded == [pair.ours.encode([text], 16)[0] for text in texts]
    assert pair.ours.encode([], 16) == []


def test_a_cut_leaves_no_trace(pair: Both) -> None:
    before = pair.ours.encode(TEXTS, 512, None)
    pair.ours.encode(TEXTS, 4, "only_first")
    assert pair.ours.encode(TEXTS, 512, None) == before


def test_cutting_a_long_pair_costs_about_as_much_as_reading_it(
    made: Callable[[str], Both],
) -> None:
    ours, long = made("example").ours, [("word " * 8000, "word " * 8000)]
    started_s = time.perf_counter()
    ours.encode(long, 128, None)
    read_s = time.perf_counter() - started_s
    ours.encode(long, 128, "longest_first")
    assert time.perf_counter() - started_s < 20 * read_s  # not the square of its length


def expected_windows(
    oracle: Any, text: Input, max_length: int, stride: int, strategy: str
) -> list[Tokens] | None:
    """What AutoTokenizer gives, None where it cannot cut."""
    parts = [[text]] if isinstance(text, str) else [[part] for part in text]
    try:
        out = oracle(
            *parts, truncation=strategy, max_length=max_length, stride=stride,
            return_overflowing_tokens=True,
        )  # fmt: skip
    except BaseException:  # a Rust panic, where the stride is over the room, is no Exception
        return None
    ids = out["input_ids"]
    types = out.get("token_type_ids", [None] * len(ids))
    return [Tokens(i, t if t and any(t) else None) for i, t in zip(ids, types, strict=True)]


LONG = [
    "", "short", "word " * 60, "tokenization of Übergrößen 👍🏽 東京 " * 12, "one two three " * 5,
    "x" * 3000, "a\0b [SEP] ##ing " * 9,
]  # fmt: skip
LONG_PAIRS = [
    ("word " * 60, "what of it?"), ("what of it?", "one two three " * 20), ("", "word " * 60),
    ("word " * 60, ""), ("word " * 60, "one two " * 30), ("a", "b"),
]  # fmt: skip


@pytest.mark.parametrize("stride", [0, 1, 7, 12, 13])
@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
def test_windows_are_autotokenizer_s_overflowing_tokens(
    pair: Both, strategy: str, stride: int
) -> None:
    texts: list[Input] = [*(LONG if strategy != "only_second" else []), *LONG_PAIRS]
    checked = 0
    for text in texts:
        if strategy == "longest_first" and not isinstance(text, str):
            continue  # that makes windows of both texts
        for max_length in (16, 17, 64):
            expected = expected_windows(pair.oracle, text, max_length, stride, strategy)
            if expected is None:
                with pytest.raises(ValueError, match="which must be over the stride"):
                    pair.ours.windows([text], max_length, stride, strategy, max_windows=9999)
                continue
            given = pair.ours.windows([text], max_length, stride, strategy, max_windows=9999)
            assert given is not None
            assert [window.tokens for window in given[0]] == expected, (text, max_length)
            checked += len(expected) > 1
    assert checked > 1


@given(st.text(max_size=300), st.integers(6, 40), st.integers(0, 5), st.sampled_from(["a", "b c"]))
def test_windows_of_any_text_and_pair_are_autotokenizer_s(
    made: Callable[[str], Both], text: str, max_length: int, stride: int, other: str
) -> None:
    both = made("example")
    for one, strategy in ((text, "longest_first"), ((other, text), "only_second")):
        expected = expected_windows(both.oracle, one, max_length, stride, strategy)
        if expected is not None:
            ours = both.ours.windows([one], max_length, stride, strategy, max_windows=9999)
            assert [window.tokens for window in (ours or [[]])[0]] == expected


@pytest.mark.parametrize("stride", [0, 5])
def test_no_token_is_left_out_of_all_windows(pair: Both, stride: int) -> None:
    for text in LONG:
        (whole,) = pair.ours.encode([text], 10**6, spans=True)
        assert whole.spans is not None
        (windows,) = pair.ours.windows(
            [text], 16, stride, "longest_first", max_windows=9999, spans=True
        ) or [[]]
        spans = [span for span in whole.spans if span is not None]
        seen = {}
        for window in windows:
            own = [span for span in window.spans or [] if span is not None]
            assert own == spans[window.first : window.first + len(own)]
            seen |= {window.first + place: span for place, span in enumerate(own)}
            assert window.num_tokens == len(whole.tokens.ids)
        assert [seen[place] for place in range(len(spans))] == spans


def test_windows_over_the_limit_are_not_made(made: Callable[[str], Both]) -> None:
    ours, text = made("example").ours, "word " * 1000  # of 10: 100 windows
    for texts, limit in (([text], 100), ([text, "word", text], 201)):
        windows = ours.windows(texts, 12, 0, "only_first", max_windows=limit)
        assert windows is not None
        assert sum(map(len, windows)) == limit
        assert ours.windows(texts, 12, 0, "only_first", max_windows=limit - 1) is None
    assert ours.windows(["a"] * 3, 12, 0, "only_first", max_windows=2) is None
    started_s = time.perf_counter()
    assert ours.windows(["word " * 200_000], 512, 509, "only_first", max_windows=1000) is None
    assert time.perf_counter() - started_s < 10  # 200 million tokens, had they been made


@pytest.mark.parametrize("max_length", [8, 512])
def test_spans_are_those_of_autotokenizer(pair: Both, max_length: int) -> None:
    for text in TEXTS:
        out = pair.oracle(
            text, truncation=True, max_length=max_length,
            return_offsets_mapping=True, return_special_tokens_mask=True,
        )  # fmt: skip
        (encoded,) = pair.ours.encode([text], max_length, spans=True)
        assert encoded.tokens.ids == out["input_ids"]
        expected = zip(out["offset_mapping"], out["special_tokens_mask"], strict=True)
        assert [span and span[:2] for span in encoded.spans or []] == [
            None if special else tuple(offsets) for offsets, special in expected
        ]


def test_what_is_too_long_to_be_read_is_not_located(made: Callable[[str], Both]) -> None:
    ours = made("example").ours
    (long,) = ours.encode(["word " * 20], 16, None, spans=True)
    assert (long.num_tokens, long.spans) == (22, None)


def test_eight_threads_at_once_get_what_one_alone_gets(pair: Both) -> None:
    chance = random.Random(0)
    jobs = [
        (chance.sample(TEXTS, 5), chance.choice([4, 8, 30, 128]), chance.choice(STRATEGIES[:2]))
        for _ in range(160)
    ]
    alone = [pair.ours.encode(*job) for job in jobs]
    fresh = Tokenizer(pair.vocabulary)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda job: fresh.encode(*job), jobs)) == alone


@pytest.mark.parametrize(("max_positions", "max_length"), [(None, 512), (64, 64), (9999, 512)])
def test_the_longest_input_is_what_tokenizer_and_positions_allow(
    max_positions: int | None, max_length: int
) -> None:
    assert export_vocabulary(stand_in(BASE, max_positions))["max_length"] == max_length


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "deberta-v2", "llama"])
def test_a_base_without_a_tokenizer_says_so(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    with pytest.raises(BaseUnavailable, match="tokenizer") as caught:
        export_vocabulary(stand_in(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_bytes", [0, 2**21, 2**23])
def test_pages_are_small_and_put_together_give_the_vocabulary(
    made: Callable[[str], Both], num_bytes: int
) -> None:
    vocabulary = made("example").vocabulary.copy()
    vocabulary["backend"] += random.Random(0).randbytes(num_bytes // 2).hex()  # does not compress
    pages = to_pages(vocabulary)
    assert len(pages) >= max(1, num_bytes // 2 // PAGE_BYTES)
    assert all(0 < len(page) <= PAGE_BYTES == 2**20 for page in pages)
    assert orjson.loads(zlib.decompress(b"".join(pages))) == vocabulary
