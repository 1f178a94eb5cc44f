import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

from adapters.artifact import Artifact
from adapters.geometry import Geometry
from adapters.tokenizer import BaseTokenizer, Comparison
from adapters.tokenizer_form import SECTIONS, TokenizerForm

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "##c", "é", "\u2028", "new"]
Json = dict[str, Any]
Change = Callable[[Json], Any]


def word_piece(words: list[str] = WORDS, **normalizer: bool) -> tokenizers.Tokenizer:
    """A tokenizer as BERT's."""
    vocabulary = {word: index for index, word in enumerate(words)}
    made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(**normalizer)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.add_special_tokens(WORDS[:4])
    return made


def byte_pairs() -> tokenizers.Tokenizer:
    vocabulary = {"a": 0, "b": 1, "ab": 2, "Ġ": 3}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


def unigrams() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.25)], 0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return made


def base(
    made: tokenizers.Tokenizer | None = None, file: str | None = None, **settings: Any
) -> BaseTokenizer:
    return BaseTokenizer(
        (made or word_piece()).to_str(),
        file=file,
        settings=settings,
        truncation_side="right",
        max_length=64,
    )


def compare(ours: BaseTokenizer, **files: Any) -> Comparison:
    """Compare files; a content is bytes or JSON, and two underscores in a name are a dot."""
    contents = {
        name.replace("__", "."): content
        if isinstance(content, bytes)
        else json.dumps(content).encode()
        for name, content in files.items()
    }
    return ours.compare(contents)


def problem(ours: BaseTokenizer, **files: Any) -> str:
    (told,) = compare(ours, **files).problems
    return told


def raw(made: tokenizers.Tokenizer | None = None) -> Json:
    value: Json = json.loads((made or word_piece()).to_str())
    return value


@pytest.mark.parametrize("make", [word_piece, byte_pairs, unigrams])
def test_the_bases_own_tokenizer_is_the_same(make: Callable[[], tokenizers.Tokenizer]) -> None:
    assert compare(base(make()), tokenizer__json=raw(make())) == Comparison()
    assert compare(base(make())) == Comparison()


def test_what_training_leaves_in_it_does_not_count() -> None:
    trained = word_piece()
    trained.enable_truncation(16, direction="right")
    trained.enable_padding(pad_id=0, pad_token="[PAD]", length=16)
    theirs = {**raw(trained), "version": "2.0", "decoder": {"type": "WordPiece"}}
    reordered = dict(reversed(theirs.items()))
    reordered["model"] = dict(reversed(theirs["model"].items()))
    reordered["added_tokens"] = theirs["added_tokens"][::-1]
    text = json.dumps(reordered, indent=8).encode()
    assert compare(base(), tokenizer__json=text) == Comparison((), 16)


def to_old_pairs(value: Json) -> None:
    model = value["model"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    for key in ("dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges"):
        del model[key]
    del value["pre_tokenizer"]["use_regex"]


def to_old_unigrams(value: Json) -> None:
    del value["model"]["byte_fallback"]
    value["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "str_rep": "▁", "add_prefix_space": True,
    }  # fmt: skip


@pytest.mark.parametrize(("make", "age"), [(byte_pairs, to_old_pairs), (unigrams, to_old_unigrams)])
def test_what_older_versions_wrote_is_the_same_as_the_library_reads_it(
    make: Callable[[], tokenizers.Tokenizer], age: Callable[[Json], None]
) -> None:
    old = raw(make())
    age(old)
    oracle = tokenizers.Tokenizer.from_str(json.dumps(old))  # the library takes it as such
    assert TokenizerForm.of(old) == TokenizerForm.of(raw(oracle))
    assert compare(base(make()), tokenizer__json=old) == Comparison()


def test_the_bases_file_is_the_base_too_whatever_transformers_made_of_it() -> None:
    file = word_piece(lowercase=False).to_str()
    assert problem(base(), tokenizer__json=json.loads(file))
    assert compare(base(file=file), tokenizer__json=json.loads(file)) == Comparison()


def lower(value: Json) -> None:
    value["normalizer"]["lowercase"] = False


def swap(value: Json) -> None:
    value["model"]["vocab"] |= {"a": 5, "b": 4}


def shrink(value: Json) -> None:
    del value["model"]["vocab"]["new"]


def no_template(value: Json) -> None:
    value["post_processor"] = None


def split(value: Json) -> None:
    value["pre_tokenizer"] = {"type": "WhitespaceSplit"}


def no_normalizer(value: Json) -> None:
    del value["normalizer"]


def strip(value: Json) -> None:
    value["added_tokens"][0]["lstrip"] = True


def fewer(value: Json) -> None:
    value["added_tokens"].pop()


@pytest.mark.parametrize(
    ("change", "section"),
    [
        (lower, "normalizer"), (swap, "model"), (shrink, "model"), (no_normalizer, "normalizer"),
        (no_template, "post_processor"), (split, "pre_tokenizer"), (strip, "added_tokens"),
        (fewer, "added_tokens"),
    ],
)  # fmt: skip
def test_another_tokenizer_is_refused_and_what_differs_is_named(
    change: Change, section: str
) -> None:
    theirs = raw()
    change(theirs)
    assert f"tokenizer.json is not the base's ({section}); train with" in problem(
        base(), tokenizer__json=theirs
    )


def test_another_order_of_merges_is_another_tokenizer() -> None:
    vocabulary = {"a": 0, "b": 1, "ab": 2, "ba": 3}
    orders = [[("a", "b"), ("b", "a")], [("b", "a"), ("a", "b")]]
    made, other = (tokenizers.Tokenizer(models.BPE(vocabulary, order)) for order in orders)
    assert compare(base(made), tokenizer__json=raw(made)) == Comparison()
    assert "(model)" in problem(base(made), tokenizer__json=raw(other))
    said = "; ".join(compare(base(byte_pairs()), tokenizer__json=raw()).problems)
    assert all(section in said for section in ("model", "normalizer", "pre_tokenizer"))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_counts(section: str) -> None:
    assert section in base()._forms[0].differing(TokenizerForm.of(raw(unigrams()) | {"model": {}}))


def test_new_tokens_are_refused_with_a_few_of_their_names() -> None:
    theirs = word_piece()
    theirs.add_tokens([AddedToken(f"<t{n}>") for n in range(9)])
    said = problem(base(), tokenizer__json=raw(theirs))
    assert said == (
        "its tokenizer has 9 tokens that the base's has not (<t0>, <t1>, <t2>, <t3> and 5 more); "
        "train without new tokens"
    )


def test_an_old_word_marked_as_special_is_refused_too() -> None:
    theirs = word_piece()
    theirs.add_special_tokens(["new"])
    assert "is not the base's (added_tokens)" in problem(base(), tokenizer__json=raw(theirs))


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens__json": {"<new>": 10}},
        {"tokenizer_config__json": {"extra_special_tokens": ["<new>", "[SEP]"]}},
        {"tokenizer_config__json": {"extra_special_tokens": {"image_token": "<new>"}}},
        {"tokenizer_config__json": {"additional_special_tokens": ["<new>"]}},
        {"tokenizer_config__json": {"added_tokens_decoder": {"10": {"content": "<new>"}}}},
    ],
)
@pytest.mark.parametrize("with_file", [True, False])
def test_new_tokens_beside_a_tokenizer_are_seen(files: Json, with_file: bool) -> None:
    own = {"tokenizer__json": raw()} if with_file else {}
    assert "(<new>); train without new tokens" in problem(base(), **own, **files)


def test_tokens_that_the_base_has_are_not_new() -> None:
    config = {
        "added_tokens_decoder": {"0": {"content": "[PAD]"}, "3": {"content": "[SEP]"}},
        "extra_special_tokens": ["[CLS]"],
        "additional_special_tokens": None,
    }
    assert compare(base(), tokenizer_config__json=config) == Comparison()
    assert compare(base(), added_tokens__json={"[PAD]": 0}) == Comparison()
    assert "[PAD]" in problem(base(), added_tokens__json={"[PAD]": 1})


SAME = "\n".join(WORDS).encode()


@pytest.mark.parametrize("text", [SAME, SAME + b"\n", SAME.replace(b"\n", b"\r\n")])
def test_a_word_list_is_compared(text: bytes) -> None:
    assert compare(base(), vocab__txt=text) == Comparison()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SAME + b"\nmore", "1 tokens differ (more)"),
        (SAME.replace(b"a\nb", b"b\na"), "2 tokens differ (a, b)"),
        (b"", "differ"),
        (b"\xff\xfe" * 99, "differ"),
    ],
)
def test_another_word_list_is_refused(text: bytes, said: str) -> None:
    told = problem(base(), vocab__txt=text)
    assert "vocab.txt is not the base's" in told
    assert said in told


@pytest.mark.parametrize(
    ("make", "name"),
    [(byte_pairs, "vocab.txt"), (word_piece, "vocab.json"), (unigrams, "spiece.model")],
)
def test_a_vocabulary_that_cannot_be_compared_says_what_to_save(
    make: Callable[[], tokenizers.Tokenizer], name: str
) -> None:
    (said,) = base(make()).compare({name: b"{}"}).problems
    assert said.startswith(f"{name} cannot be compared with the base's tokenizer; save the token")
    assert base(make()).compare(
        {name: b"{}", "tokenizer.json": json.dumps(raw(make())).encode()}
    ) == (Comparison())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"do_lower_case": False}, "do_lower_case is false, the base's is true"),
        ({"strip_accents": True}, "strip_accents is true, the base's is null"),
        ({"tokenize_chinese_chars": False}, "tokenize_chinese_chars is false"),
        ({"add_eos_token": True}, "add_eos_token is true, the base's is false"),
        ({"split_special_tokens": True}, "split_special_tokens is true, the base's is false"),
        ({"do_lower_case": {"x": 1}}, "do_lower_case is {"),
    ],
)
def test_a_setting_that_changes_ids_is_refused(config: Json, said: str) -> None:
    ours = base(add_eos_token=False, split_special_tokens=False)
    told = problem(ours, tokenizer__json=raw(), tokenizer_config__json=config)
    assert told.startswith(f"tokenizer_config.json: {said}")


def test_settings_that_are_the_bases_or_that_it_does_not_know_are_taken() -> None:
    config = {
        "do_lower_case": True, "strip_accents": None, "add_prefix_space": True, "add_bos_token": 1,
        "tokenizer_class": "BertTokenizerFast", "padding_side": "left", "clean_up": False,
    }  # fmt: skip
    assert compare(base(), tokenizer_config__json=config) == Comparison()
    # A base whose own files contradict each other is not another base.
    odd = base(do_lower_case=False)
    assert compare(odd, tokenizer_config__json={"do_lower_case": False}) == Comparison()
    assert compare(odd, tokenizer_config__json={"do_lower_case": True}) == Comparison()


@pytest.mark.parametrize("direction", ["Left", "Right"])
def test_another_truncation_side_is_refused(direction: str) -> None:
    truncation = {"direction": direction, "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    theirs = {**raw(), "truncation": truncation}
    told = compare(base(), tokenizer__json=theirs).problems
    assert bool(told) == (direction == "Left")
    # What tokenizer_config.json says is what the next call would have done.
    for side in ("left", "right"):
        config = {"truncation_side": side}
        told = compare(base(), tokenizer__json=theirs, tokenizer_config__json=config).problems
        assert ["cuts long texts on the left, the base's on the right" in t for t in told] == (
            [True] if side == "left" else []
        )


@pytest.mark.parametrize(
    ("cut_at", "limit", "length"),
    [
        (16, 512, 16), (16, 32, 16), (None, 32, 32), (None, 64, None), (None, 512, None),
        (None, 1e30, None), (None, 10**30, None), (0, None, None), (-5, 0, None), ("9", "9", None),
        (True, True, None), (None, -1, None), ([], {}, None), (99, None, 99),
    ],
)  # fmt: skip
def test_the_length_in_training_is_told(cut_at: Any, limit: Any, length: int | None) -> None:
    theirs = {**raw(), "truncation": None if cut_at is None else {"max_length": cut_at}}
    config = {"model_max_length": limit}
    assert compare(base(), tokenizer__json=theirs, tokenizer_config__json=config) == (
        Comparison((), length)
    )


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"null", b"[]", b"3", b'"x"', b"{}", b"[" * 100_000,
        b'{"model":' * 900 + b"1" + b"}" * 900, b'{"a":' * 100_000, b'{"model": 1}',
        b'{"model": {}, "added_tokens": [1]}', b'{"model": {}, "added_tokens": {"a": 1}}',
        b'{"model": {"type": []}, "added_tokens": []}', b'{"model": {"merges": [[]]}}',
        b'{"model": {}, "added_tokens": 5}', b'{"model": {"vocab": {"\\ud800": 1}}}',
        b'{"model": {"type": "BPE", "merges": {"a": 1}}}', b"9" * 5000,
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_broken_files_get_sentences_and_no_crash(name: str, content: bytes) -> None:
    problems = base().compare({name: content}).problems
    if name == "tokenizer.json":
        assert problems
    for told in problems:
        assert "tokenizer" in told or "tokens" in told
        assert len(told) < 400


def test_a_broken_files_sentence_says_what_to_save() -> None:
    for content in (b"{", b"[]", b"{}"):
        assert "; save the tokenizer that it was trained with as tokenizer.json" in problem(
            base(), tokenizer__json=content
        )


def test_a_file_that_the_library_panics_on_is_refused() -> None:
    theirs = raw() | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    with pytest.raises(BaseException, match="Precompiled"):
        tokenizers.Tokenizer.from_str(json.dumps(theirs))
    assert "(normalizer)" in problem(base(), tokenizer__json=theirs)


def test_the_same_files_are_compared_once() -> None:
    words = [*WORDS, *(f"w{n}" for n in range(50_000))]
    ours = base(word_piece(words))
    theirs = json.dumps(raw(word_piece(words))).encode()
    started_s = time.perf_counter()
    first = ours.compare({"tokenizer.json": theirs})
    once_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    for _ in range(20):
        assert ours.compare({"tokenizer.json": bytes(bytearray(theirs))}) is first
    assert (time.perf_counter() - started_s) / 20 < once_s / 2


def test_what_is_remembered_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.tokenizer._REMEMBERED", 8)
    ours = base()
    for n in range(100):
        assert compare(ours, tokenizer_config__json={"n": n}) == Comparison()
        assert len(ours._remembered) <= 8


def test_an_artifact_is_compared_where_the_base_has_a_tokenizer(
    read: Callable[..., Artifact], refused: Callable[..., tuple[str, ...]], geometry: Geometry
) -> None:
    theirs: Mapping[str, Any] = {**raw(), "truncation": {"max_length": 12}}
    other = {**theirs, "normalizer": None}
    having = replace(geometry, tokenizer=base())
    assert read(geometry=having, tokenizer__json=theirs).training_length == 12
    assert refused(geometry=having, tokenizer__json=other) == (
        "tokenizer.json is not the base's (normalizer); "
        "train with the base's own tokenizer, unchanged",
    )
    assert read(tokenizer__json=other).training_length is None


def test_aliases_name_the_same_base(
    read: Callable[..., Artifact],
    refused: Callable[..., tuple[str, ...]],
    geometry: Geometry,
    config: Json,
) -> None:
    mirrored = replace(geometry, base_aliases=frozenset(("mirror/base-4bit", "other/base")))
    for theirs in ("org/base", "mirror/base-4bit", "mirror/base-4bit@main", "/some/folder"):
        config["base_model_name_or_path"] = theirs
        assert read(geometry=mirrored).num_labels == 3
    config["base_model_name_or_path"] = "strange/base"
    (told,) = refused(geometry=mirrored)
    assert told == (
        "it was trained on the base strange/base, not org/base; "
        "if they are the same, name it in base_aliases"
    )
    # A folder's hub ids are not known, unless somebody says them.
    (told,) = refused(geometry=replace(mirrored, base_id=None))
    assert "strange/base, not mirror/base-4bit" in told
    assert read(geometry=replace(geometry, base_id=None)).num_labels == 3
