"""A table of folders that are broken in one way each, and what must be said of them."""

import gc
import json
import os
import pickle
import random
import shutil
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapters.directory import Directory
from adapters.errors import AdapterError, AdapterIncomplete, AdapterRefused
from deployments.model.engine import Engine
from deployments.rows import Prediction, Row, Tokens

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD = PREFIX + "classifier.weight"
QUERY = PREFIX + "bert.encoder.layer.0.attention.self.query.lora_A.weight"
LARGE = 2**25  # bytes: enough to see that one is kept
Break = Callable[[Path], Any]
BROKEN: dict[str, tuple[Break, tuple[str, ...]]] = {}


def broken(name: str, change: Break, *words: str) -> None:
    """Add a row: a task's name, what breaks its folder, and what its sentence must hold."""
    assert name not in BROKEN
    BROKEN[name] = (change, words)


def config(**changes: Any) -> Break:
    return put(CONFIG, **changes)


def put(file: str, **changes: Any) -> Break:
    """Changes keys of a JSON file; there may be none yet."""

    def change(folder: Path) -> None:
        path = folder / file
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, **changes}))

    return change


def write(file: str, content: bytes | Callable[[bytes], bytes]) -> Break:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))

    return change


def header(entries: Any, data: bytes = bytes(64)) -> Break:
    """Writes weights with this header, JSON or bytes."""
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return write(WEIGHTS, len(raw).to_bytes(8, "little") + raw + data)


def entry(kind: str = "F32", shape: Any = (16,), offsets: Any = (0, 64)) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": offsets}


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Break:
    def edit(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)

    return edit


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    return tensors(lambda held: held.update({name: change(held[name]).contiguous()}))


def drop(name: str) -> Break:
    return tensors(lambda held: held.pop(name))


def instead(file: str, make: Callable[[Path], Any]) -> Break:
    """Makes something else in a file's place."""

    def change(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return change


def link_out(file: str) -> Break:
    def change(folder: Path) -> None:
        outside = folder.parent.parent / f"outside-{folder.name}-{file}"
        (folder / file).rename(outside)
        (folder / file).symlink_to(outside)

    return change


def link_folder(folder: Path) -> None:
    outside = folder.parent.parent / f"outside-{folder.name}"
    folder.rename(outside)
    folder.symlink_to(outside)


def sparse(file: str, size: int) -> Break:
    def change(folder: Path) -> None:
        with (folder / file).open("ab") as open_file:
            open_file.truncate(size)

    return change


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


# Files that are not there, not whole, or no files.
broken("no-weights", lambda f: (f / WEIGHTS).unlink(), WEIGHTS, "missing")
broken("pickle", only_pickle, "adapter_model.bin", "pickle", "safe_serialization=True")
broken("empty-weights", write(WEIGHTS, b""), "has only 0 bytes")
broken("half-weights", write(WEIGHTS, lambda raw: raw[: len(raw) // 2]), "of", "bytes")
broken("no-last-byte", write(WEIGHTS, lambda raw: raw[:-1]), "of", "bytes")
broken("empty-config", write(CONFIG, b""), f"{CONFIG} is not valid JSON")
broken("half-config", write(CONFIG, lambda raw: raw[:99]), f"{CONFIG} is not valid JSON")
broken("pipe", instead(WEIGHTS, os.mkfifo), f"{WEIGHTS} is a pipe or device, not a file")
broken("config-pipe", instead(CONFIG, os.mkfifo), f"{CONFIG} is a pipe or device, not a file")
broken("folder", instead(WEIGHTS, Path.mkdir), f"{WEIGHTS} is a folder, not a file")
broken("socket", instead(WEIGHTS, bind), f"{WEIGHTS} is a socket, not a file")
broken("linked-weights", link_out(WEIGHTS), f"{WEIGHTS} is a link to outside of the store")
broken("linked-config", link_out(CONFIG), f"{CONFIG} is a link to outside of the store")
broken("linked-folder", link_folder, f"{CONFIG} is a link to outside of the store")
broken("huge-config", sparse(CONFIG, 10**8), f"{CONFIG} has 100000000 bytes, over the limit")
broken("huge-weights", sparse(WEIGHTS, 2**33), f"{WEIGHTS} has {2**33} bytes, over the limit")
broken("huge-rules", sparse("task.json", 10**9), "task.json has 1000000000 bytes")

# Weights whose header lies.
broken("zip", write(WEIGHTS, b"PK\3\4" + bytes(LARGE)), "has a header of 67324752 bytes")
broken("absurd-header", write(WEIGHTS, (2**60).to_bytes(8, "little")), f"header of {2**60} bytes")
broken("declares-2e60", header({"x": entry(offsets=[0, 2**60])}), "declares", "over the limit")
broken("overlapping", header({"a": entry(), "b": entry(shape=[8], offsets=[0, 32])}), "offset")
broken("uncovered", header({"a": entry(shape=[8], offsets=[0, 32])}), "cannot be read")
broken("backwards", header({"a": entry(offsets=[64, 0])}), "cannot be read")
broken("shape-overflow", header({"a": entry(shape=[2**40, 2**40])}), "overflow")
broken("negative-shape", header({"a": entry(shape=[-16])}), "cannot be read")
broken("word-shape", header({"a": entry(shape=["16"])}), "cannot be read", "expected usize")
broken("deep-header", header(b"[" * 100_000), "cannot be read")
broken("list-header", header([]), "cannot be read")
broken(
    "twice",
    header(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
    "match nothing here: a",
)
broken("unknown-dtype", header({"a": entry("F99")}), "cannot be read", "F99")
broken("half-byte-dtype", header({"a": entry("F4", [128])}), "cannot be read", "F4")
broken("long-name", header({"n" * 10**6: entry()}), "match nothing here: nnnn", "…")
broken("line-in-name", header({"a\nERROR b": entry()}), "match nothing here: a\\nERROR b")
broken("no-tensors", header({}, b""), "no head weights")

# Tensors.
broken("headless", drop(HEAD), "no head weights", "classifier.weight")
broken("no-query", drop(QUERY), "promised by target_modules but missing", "query.lora_A")
broken("transposed", tensor(QUERY, lambda t: t.t()), "lora_A.weight is [32, 4], not [4, 32]")
broken("other-width", tensor(HEAD, lambda t: t[:, :5]), "is [3, 5], not [3, 32]")
broken("empty-tensor", tensor(HEAD, lambda t: t[:0]), "classifier.weight is [0, 32]")
broken("nan", tensor(HEAD, lambda t: t * torch.nan), "holds NaN or infinite values")
broken("infinite", tensor(QUERY, lambda t: t / 0), "holds NaN or infinite values")
for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
    kind = str(dtype).removeprefix("torch.")
    broken(kind.replace("_", "-"), tensor(QUERY, lambda t, d=dtype: t.to(d)), f"dtype {dtype}, not")
broken("stray", tensors(lambda h: h.update(x=torch.zeros(LARGE // 4))), "match nothing here: x")
broken(
    "large-head",
    tensor(HEAD, lambda t: torch.full((LARGE // 128, 32), 1.0)),
    f"classifier.bias is [3], not [{LARGE // 128}]",
)

# The config.
broken("deep-config", write(CONFIG, b"[" * 100_000), "not valid JSON", "recursion")
broken("deep-value", write(CONFIG, b'{"peft_type":' * 900 + b"1" + b"}" * 900), "peft_type {")
broken("list-config", write(CONFIG, b"[]"), "must hold a JSON object")
broken("bytes-config", write(CONFIG, b"\xff\xfe\0"), "not valid JSON")
broken("many-keys", config(**{f"k{n}": 1 for n in range(500_000)}), "keys, over the limit of 1000")
broken("many-rules", put("task.json", **{f"k{n}": 1 for n in range(500_000)}), "task.json has 5")
broken("many-unknown", config(**{f"k{n}": 1 for n in range(900)}), "k0=1 is not served", "more")
broken("many-targets", config(target_modules=["q"] * 500_000), "500000 names, over the limit")
broken("word-rank", config(r="4"), "r must be a positive integer, not '4'")
broken("absurd-rank", config(r=10**9), "is [4, 32], not [1000000000, 32]")
broken("negative-rank", config(r=-4), "r must be a positive integer")
broken("true-rank", config(r=True), "r must be a positive integer")
broken("digits", write(CONFIG, b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}"), "not valid")
broken("word-alpha", config(lora_alpha="8"), "lora_alpha must be a number")
broken("nan-alpha", config(lora_alpha=float("nan")), "lora_alpha must be a number")
broken("other-method", config(peft_type="BOFT"), "'BOFT' is not served")
broken("no-targets", config(target_modules=[]), "target_modules names nothing")
broken("bad-pattern", config(target_modules="(query"), "not a valid regular expression")
broken(
    "endless", config(target_modules=r"(?:(?:[a-z]|[a-z.0-9])+)+[A-Z]"), "does not come to an end"
)
broken("pattern-bomb", config(target_modules="((a{999}){999}){999}"), "repeats a part more than")
broken("deep-pattern", config(target_modules="(" * 4000 + ")" * 4000), "regular expression")
broken("surrogate", config(base_model_name_or_path="\ud800"), "no text")

# The base.
broken("other-base", config(base_model_name_or_path="strange/base"), "strange/base, not org/base")
broken("other-class", config(auto_mapping={"base_model_class": "T5Model"}), "a T5Model, not Bert")
broken("other-digest", put("task.json", base_sha256="0" * 64), "base_sha256 is 00000000…")
broken("other-tokenizer", put("tokenizer.json", normalizer={"type": "NFC"}), "base's (normalizer)")
broken("broken-tokenizer", write("tokenizer.json", b"{"), "tokenizer.json is not valid JSON")
broken("new-token", put("added_tokens.json", **{"<new>": 64}), "(<new>)", "without new tokens")

# Rules and labels.
broken("many-labels", put("task.json", labels=["a"] * 4), "label names must differ")
broken("few-labels", put("task.json", labels=["a", "b"]), "names 2 labels, the head has 3")
broken("odd-labels", put("config.json", id2label={"0": "a", "2": "b"}), "id2label must map")
broken("surrogate-label", put("config.json", id2label={"0": "\udfff"}), "config.json holds", "text")
broken("unknown-rule", put("task.json", temprature=1), "temprature", "not a known rule")
broken("null-rules", write("task.json", b"null"), "task.json must hold a JSON object")


@pytest.fixture(scope="module")
def base(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny base with a tokenizer of its 64 words."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(tiny_base, folder)
    words = {f"w{n}": n for n in range(62)} | {"[PAD]": 62, "[UNK]": 63}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=40
    ).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def engine(base: str) -> Engine:
    return Engine(base, quantization="none", device="cpu", base_aliases=["org/base"])


@pytest.fixture(scope="module")
def store(
    base: str, make_adapter: Callable[..., PeftModel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Directory]:
    """Every broken folder of the table, and `good`, from which all are made."""
    root = tmp_path_factory.mktemp("broken") / "store"
    make_adapter(root / "good", base, 3)
    shutil.copy(Path(base) / "tokenizer.json", root / "good")
    for name, (change, _) in BROKEN.items():
        shutil.copytree(root / "good", root / name)
        change(root / name)
    for name in ("Groß", "ünïcode", "a\nb", "日本", "-x", "a" * 100):  # no names of tasks
        shutil.copytree(root / "good", root / name)
    shutil.copytree(root / "good", root / os.fsdecode(b"\xff\xfe"))
    yield Directory(root)
    shutil.rmtree(root.parent)


def refuse(engine: Engine, store: Directory, name: str) -> str:
    """Return what is said of a folder."""
    try:
        engine.read(store.read(name))
    except AdapterError as error:
        return str(error)
    raise AssertionError(f"{name} was read")


def answer(engine: Engine) -> list[float]:
    (prediction,) = engine.predict([Row(1, Tokens([5, 6, 7]))])
    assert isinstance(prediction, Prediction)
    return prediction.logits


def test_the_table_is_long() -> None:
    assert len(BROKEN) >= 40


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_with_its_sentence(
    engine: Engine, store: Directory, name: str
) -> None:
    started_s = time.perf_counter()
    said = refuse(engine, store, name)
    assert time.perf_counter() - started_s < 10
    assert f"task '{name}'" in said
    for word in BROKEN[name][1]:
        assert word in said
    assert said.isprintable()
    assert len(said.encode()) < 100_000
    assert "Traceback" not in said


def test_a_good_adapter_beside_them_is_read_and_answers_the_same_bits(
    engine: Engine, store: Directory
) -> None:
    engine.write(1, engine.read(store.read("good")))
    before = answer(engine)
    for name in BROKEN:
        refuse(engine, store, name)
    assert answer(engine) == before
    loaded = engine.read(store.read("good"))
    engine.write(2, loaded)
    engine.write(1, loaded)
    assert answer(engine) == before


def test_the_tasks_are_listed_beside_them(store: Directory) -> None:
    names = set(store.tasks())
    assert "good" in names
    # Where the config is no file there is no adapter; a link's target is not looked into.
    assert names <= {*BROKEN, "good"}
    assert {*BROKEN} - names == {"config-pipe"}


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_no_memory_is_left_behind(engine: Engine, store: Directory) -> None:
    for name in ("stray", "large-head"):  # which are read whole before they are refused
        assert (store.root / name / WEIGHTS).stat().st_size > LARGE
    for name in BROKEN:
        refuse(engine, store, name)
    gc.collect()
    before_bytes = resident_bytes()
    for _ in range(3):
        for name in BROKEN:
            refuse(engine, store, name)
    gc.collect()
    # Keeping one of the two large files would be 100 MB. For small ones, see below.
    assert resident_bytes() - before_bytes < LARGE
    tracemalloc.start()
    try:
        refuse(engine, store, "many-unknown")
        gc.collect()
        traced = tracemalloc.get_traced_memory()[0]
        for name in BROKEN:
            refuse(engine, store, name)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - traced < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, "tokenizer.json"])
def test_flipped_bits_are_refused_or_another_version(
    engine: Engine, store: Directory, file: str
) -> None:
    good = store.read("good")
    folder = store.root / "flipped"
    shutil.copytree(store.root / "good", folder)
    whole = (folder / file).read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little") if file == WEIGHTS else len(whole)
    chance = random.Random(0)
    # Half of them in the header, where one bit is most likely to change what is meant.
    places = [chance.randrange(start) for _ in range(150)]
    places += [chance.randrange(start, len(whole)) for _ in range(150) if file == WEIGHTS]
    refusals = []
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chance.randrange(8)
        (folder / file).write_bytes(flipped)
        try:
            files = store.read("flipped")
            assert files.version != good.version
            engine.read(files)
        except (AdapterRefused, AdapterIncomplete) as error:
            refusals.append(str(error))
    shutil.rmtree(folder)
    assert len(refusals) > 20
    assert all(said.isprintable() for said in refusals)
