"""Layers that see no padding answer as those that do, and a row among any others as alone."""

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bert.modeling_bert import BertIntermediate

from adapters.directory import Directory
from deployments.model import ragged as module
from deployments.model.engine import Engine, Loaded
from deployments.model.ragged import packed
from deployments.model.sites import EmbeddingSite, HeadSite, LinearSite, Site
from deployments.rows import Prediction, Row, Tokens
from tests.parity.bases import BASES, BY_NAME, FIRST_PLAIN_ID, VOCAB
from tests.parity.making import make
from tests.parity.variants import VARIANTS

IS_RAGGED = {
    "bert": True, "roberta": True, "xlm-roberta": True, "distilbert": True, "electra": True,
    "albert": False,  # transformers does not mark its layer, which is used twice
    "deberta-v3": False, "deberta-v2-conv": False, "deberta-v2-own-keys": False,  # own attention
    "mpnet": False,  # own attention
    "modernbert": True, "mistral": True,  # one layer or both see 8 tokens
    "llama": True, "llama-no-pad": True, "qwen2": True, "qwen3": True, "gemma": True,
    "gpt2": True, "gpt2-no-pad": True,
}  # fmt: skip
RUNNING = [name for name, runs in IS_RAGGED.items() if runs]
ADAPTERS = ("lora-own-bias", "dora", "ia3", "embedding", "token-lora-bias-all")  # slots 1 to 5
UNLIKE = (1, 23, 9, 40, 9, 9, 3, 12, 33, 1, 2)  # lengths in tokens
BATCHES = (UNLIKE, (7,), (1,), (40,), (6, 6, 6, 6), (1, 1, 1), (1, 40), (40, 1))

EngineOf = Callable[..., Engine]
Read = Callable[..., Loaded]


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> EngineOf:
    """Returns an engine of a base of the matrix, with the adapters in their slots."""

    @cache
    def start(name: str, quantization: str = "none", **sizes: int) -> Engine:
        base, folder = BY_NAME[name], tmp_path_factory.mktemp("base")
        base, store = replace(base, config=base.config | sizes), Directory(folder / "store")
        saved = base.save("bare", folder / "base")
        engine = Engine(saved, quantization=quantization, device="cpu")
        for slot, task in enumerate(ADAPTERS, start=1):
            (variant,) = (variant for variant in VARIANTS if variant.name == task)
            make(base, saved, variant, store.root / task, seed=slot)
            engine.write(slot, engine.read(store.read(task)))
        return engine

    return start


def rows_of(name: str, lengths: Sequence[int]) -> list[Row]:
    """Rows of some lengths, the adapters taking turns; some are pairs."""
    dice, rows = random.Random(str(lengths)), []
    for index, length in enumerate(lengths):
        ids = dice.choices(range(FIRST_PLAIN_ID, VOCAB), k=length)
        pair = [int(2 * at >= length) for at in range(length)]
        paired = BY_NAME[name].segments and index % 3 == 1
        rows.append(Row(1 + index % len(ADAPTERS), Tokens(ids, pair if paired else None)))
    return rows


@contextmanager
def padded(engine: Engine) -> Iterator[None]:
    assert engine.encoder.is_ragged
    engine.encoder.is_ragged = False
    yield
    engine.encoder.is_ragged = True


def ask(
    engine: Engine, rows: Sequence[Row], num_tokens: int | None = None, grad: bool = False
) -> list[torch.Tensor]:
    """Returns the logits of each row, [labels] or [its tokens, labels]."""
    with torch.inference_mode(not grad):
        parts = [iter(() if part is None else part) for part in engine.forward(rows, num_tokens)]
        answers = []
        for row in rows:
            of_tokens = engine._of_tokens(row)
            answer = next(parts[of_tokens])[..., : engine._residents[row.slot].num_labels]
            answers.append(answer[: row.num_tokens] if of_tokens else answer)
    return answers


def rounded_up(num_tokens: int) -> int:
    step = 4 if num_tokens <= 64 else 16
    return -(-num_tokens // step) * step


def assert_close(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)


def assert_same_bits(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


def test_which_architectures_run_without_padding(engine_of: EngineOf) -> None:
    assert {base.name: engine_of(base.name).encoder.is_ragged for base in BASES} == IS_RAGGED
    # What sees padding must at least not be changed by it: docs/adr/0002.
    assert engine_of("albert").encoder.config._attn_implementation == "onebase_steady"


@pytest.mark.parametrize("name", RUNNING)
def test_rows_of_any_lengths_are_answered_as_with_padding(name: str, engine_of: EngineOf) -> None:
    engine = engine_of(name)
    for lengths in BATCHES:
        rows = rows_of(name, lengths)
        with padded(engine):
            want = ask(engine, rows)
        assert_close(ask(engine, rows), want)
        for prediction, theirs in zip(engine.predict(rows), want, strict=True):
            assert isinstance(prediction, Prediction)
            assert_close([torch.tensor(prediction.logits)], [theirs])


def test_a_batch_as_wide_as_all_its_tokens_is_answered_likewise(engine_of: EngineOf) -> None:
    engine, rows = engine_of("bert"), rows_of("bert", (20, 11))
    assert_close(ask(engine, rows, 32), ask(engine, rows, 33))


@pytest.mark.parametrize("name", RUNNING)
def test_layers_see_no_padding_and_embeddings_and_heads_do(name: str, engine_of: EngineOf) -> None:
    engine, rows = engine_of(name), rows_of(name, UNLIKE)
    models = (engine.encoder.model, *engine.encoder._graphs.values())
    every = {m for model in models for m in model.modules()}
    layers = [m for m in every if isinstance(m, GradientCheckpointingLayer)]
    within = {m for layer in layers for m in layer.modules() if isinstance(m, LinearSite)}
    seen: dict[nn.Module, list[torch.Size]] = {}
    watched = [m for m in every if isinstance(m, (EmbeddingSite, HeadSite))]
    watched += [site.module for site in within]
    hooks = [
        m.register_forward_pre_hook(lambda m, x: seen.setdefault(m, []).append(x[0].shape))
        for m in watched
    ]
    ask(engine, rows)
    for hook in hooks:
        hook.remove()
    assert len(layers) == 2
    for site in within:
        (shape,) = seen[site.module]
        assert shape[:-1].numel() == rounded_up(sum(UNLIKE))
    of_words = [shapes for m, shapes in seen.items() if isinstance(m, EmbeddingSite)]
    assert of_words == [[(len(UNLIKE), max(UNLIKE))]]
    of_heads = [s for m, shapes in seen.items() if isinstance(m, HeadSite) for s in shapes]
    assert of_heads
    for num_rows, *num_tokens, _ in of_heads:  # rows of texts, of tokens, and of a pooler
        assert num_rows in (9, 2, 11)
        assert num_tokens in ([], [max(UNLIKE)])


@contextmanager
def hidden_of(engine: Engine) -> Iterator[list[torch.Tensor]]:
    """What the encoder gives in each forward."""
    given: list[torch.Tensor] = []
    hook = engine.encoder.model.base_model.register_forward_hook(lambda *of: given.append(of[2][0]))
    yield given
    hook.remove()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("threads")
def test_in_int8_no_neighbour_order_or_length_changes_a_bit(
    example_engine: Callable[[str], Engine], heldout: dict[str, list[Row]]
) -> None:
    engine, dice = example_engine("int8"), random.Random(0)
    by_length = [sorted(rows, key=lambda row: row.num_tokens) for rows in heldout.values()]
    tasks = [[*rows[:2], *rows[40:43], rows[-1]] for rows in by_length]
    rows = [row for turn in zip(*tasks, strict=True) for row in turn]
    longest = max(rows, key=lambda row: row.num_tokens)
    batches = [rows, dice.sample(rows, len(rows)), dice.sample(rows, len(rows)), *tasks]
    batches += [batch for row in rows[8:14] for batch in ([row, longest], [longest, row, row])]
    assert len(tasks) == len({row.slot for row in rows}) > 2
    with hidden_of(engine) as given:
        answers = {id(row): ask(engine, [row])[0] for row in rows}
        alone = {id(row): hidden[0] for row, hidden in zip(rows, given, strict=True)}
        for batch in batches:
            got = ask(engine, batch)
            hidden = [h[: row.num_tokens] for h, row in zip(given[-1], batch, strict=True)]
            assert_same_bits(hidden, [alone[id(row)] for row in batch])
            # Heads of several sizes share a product in fp32, which is as wide as the largest.
            same = assert_same_bits if len({row.slot for row in batch}) == 1 else assert_close
            same(got, [answers[id(row)] for row in batch])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", ["bert", "modernbert", "mistral", "gemma"])
def test_in_int8_other_layers_give_the_same_bits_too(name: str, engine_of: EngineOf) -> None:
    # Whole vectors, as in any real base: what is left over takes another path through GELU. So
    # does, of ModernBERT, a batch that is one token.
    engine = engine_of(name, "int8", intermediate_size=64)
    rows = rows_of(name, UNLIKE[1:-2])
    with hidden_of(engine) as given:
        for batch in (rows, *([row] for row in rows)):
            ask(engine, batch)
    hidden = [h[: row.num_tokens] for h, row in zip(given[0], rows, strict=True)]
    assert_same_bits(hidden, [of_row[0] for of_row in given[1:]])


def from_row_to_row(x: torch.Tensor) -> torch.Tensor:
    return x + x.roll(1, dims=1)


def of_rows_only(x: torch.Tensor) -> torch.Tensor:
    if packed() is not None:
        raise ArithmeticError("these are no rows")
    return x


@pytest.mark.parametrize(
    ("change", "said"),
    [(from_row_to_row, "packed rows are off by "), (of_rows_only, "ArithmeticError('these are")],
)
def test_layers_that_know_rows_are_left_as_they_were_and_one_line_says_so(
    change: Callable[[torch.Tensor], torch.Tensor],
    said: str,
    tiny_base: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    forward = BertIntermediate.forward
    with caplog.at_level("WARNING", "ray.serve"):
        assert tiny_engine(tiny_base).encoder.is_ragged is True
        assert not caplog.records
        monkeypatch.setattr(BertIntermediate, "forward", lambda self, x: forward(self, change(x)))
        engine = tiny_engine(tiny_base)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"layers run over padding too: {said}")
    assert engine.encoder.is_ragged is False
    assert module._running.get() is None
    model, plain = engine.encoder.model, BertModel.from_pretrained(tiny_base).eval()
    assert model.config._attn_implementation == "onebase_steady"
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    batch = {"input_ids": torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])}
    batch["attention_mask"] = batch["input_ids"].clamp(max=1)
    engine.encoder.bank.route([0, 0])
    with torch.inference_mode():
        assert_close(model.base_model(**batch)[0], plain(**batch)[0])


def tiny_engine(base: str, **given: Any) -> Engine:
    return Engine(base, quantization="none", device="cpu", **given)


def tiny_rows(slots: Sequence[int]) -> list[Row]:
    return [Row(slot, Tokens([*range(5, 9 + 3 * index)])) for index, slot in enumerate(slots)]


@pytest.fixture
def read(tiny_base: str, make_adapter: Callable[..., PeftModel], tmp_path_factory: Any) -> Read:
    """Makes a random adapter of the tiny base, and reads it for an engine."""

    def read(engine: Engine, **given: Any) -> Loaded:
        store = Directory(tmp_path_factory.mktemp("store"))
        make_adapter(store.root / "task", tiny_base, 3, **given)
        return engine.read(store.read("task"))

    return read


def test_a_module_runs_once_and_nothing_follows_if_no_row_changes_it(
    tiny_base: str, read: Read
) -> None:
    engine, rows = tiny_engine(tiny_base), tiny_rows([1, 2, 1, 2])
    engine.write(1, read(engine, targets=r".*layer\.1\..*(query|key)"))
    engine.write(2, read(engine, targets=r".*layer\.1\..*query"))
    layers = engine.encoder.model.base_model.encoder.layer
    sites = {path: site for path, site in layers.named_modules() if isinstance(site, Site)}
    assert len(sites) == 2 * 8  # six linears and two norms a layer
    gave: dict[nn.Module, list[torch.Tensor]] = {}
    for one in (one for site in sites.values() for one in (site, site.module)):
        one.register_forward_hook(lambda m, _, y: gave.setdefault(m, []).append(y))
    ask(engine, rows)
    changed = set()
    for path, site in sites.items():
        (of_module,), (of_site,) = gave[site.module], gave[site]
        assert of_module.shape[:-1].numel() == rounded_up(sum(row.num_tokens for row in rows))
        if of_site is not of_module:
            changed.add(path)
    assert changed == {"1.attention.self.query", "1.attention.self.key"}


def test_a_slot_is_answered_by_what_was_written_last(tiny_base: str, read: Read) -> None:
    engine, rows = tiny_engine(tiny_base), tiny_rows([1, 2, 1, 3, 2])
    loaded = [read(engine, seed=seed, rank=rank) for seed, rank in enumerate((4, 4, 4, 9))]

    def assert_holds(*indices: int) -> None:
        fresh = tiny_engine(tiny_base)
        for slot, index in enumerate(indices, start=1):
            fresh.write(slot, loaded[index])
        assert_same_bits(ask(engine, rows), ask(fresh, rows))

    for slot in (1, 2, 3):
        engine.write(slot, loaded[slot - 1])
    first = ask(engine, rows)
    engine.write(2, loaded[0])  # of the same packing, in the same pages
    assert_holds(0, 0, 2)
    changed = [not torch.equal(*pair) for pair in zip(ask(engine, rows), first, strict=True)]
    assert changed == [False, True, False, False, True]
    engine.forget([1, 2])
    gone = [isinstance(answer, Exception) for answer in engine.predict(rows)]
    assert gone == [True, True, True, False, True]
    engine.write(2, loaded[2])  # where slot 1 was
    engine.write(1, loaded[3])  # of another packing
    assert_holds(3, 2, 2)


def test_an_adapter_in_pieces_answers_as_one_in_one_piece(tiny_base: str, read: Read) -> None:
    roomy, rows = tiny_engine(tiny_base), tiny_rows([2, 5, 4, 5, 5])
    small = [read(roomy, rank=4, seed=seed) for seed in range(4)]
    large = [read(roomy, rank=6, seed=seed) for seed in (5, 6)]
    tight = tiny_engine(tiny_base, bank_bytes=4 * small[0].num_bytes)
    for engine in (roomy, tight):
        for slot, loaded in enumerate(small, start=1):
            engine.write(slot, loaded)
        engine.forget([1, 3])
    for loaded, num_pieces in ((large[0], 2), (large[1], 2), (small[0], 1)):
        roomy.write(5, loaded)
        tight.write(5, loaded)
        seats = [engine.encoder.bank._seats[5] for engine in (roomy, tight)]
        assert [len(seat.pieces) for seat in seats] == [1, num_pieces]
        for _ in range(2):  # the second time of what was kept
            assert_same_bits(ask(tight, rows), ask(roomy, rows))
        assert (seats[1].own is None) is (num_pieces > 1), "a second copy of it is kept"


def test_a_module_of_a_layer_that_adapters_alone_bring_is_answered_by_row(
    tiny_base: str, make_adapter: Callable[..., PeftModel], tmp_path: Path
) -> None:
    base, lacking = tmp_path / "base", "encoder.layer.0.output.dense"
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if lacking not in name}
    assert len(kept) == len(weights) - 2
    save_file(kept, base / "model.safetensors", {"format": "pt"})
    engine, store = tiny_engine(str(base)), Directory(tmp_path / "store")
    for slot in (1, 2):
        folder = store.root / f"task{slot}"
        make_adapter(folder, str(base), 3, seed=slot, saved=[lacking.removeprefix("encoder.")])
        engine.write(slot, engine.read(store.read(folder.name)))
    rows = tiny_rows([1, 2, 2, 1])
    assert engine.encoder.is_ragged
    got = ask(engine, rows)
    with padded(engine):
        assert_close(got, ask(engine, rows))
    assert_close(got, [answer for row in rows for answer in ask(engine, [row])])


@pytest.mark.parametrize("name", ["bert", "modernbert", "mistral", "gpt2"])
def test_gradients_reach_the_embeddings_as_with_padding(name: str, engine_of: EngineOf) -> None:
    engine, rows = engine_of(name), rows_of(name, UNLIKE)
    engine.predict(rows)  # inference before it must leave nothing that stops them
    words = engine.encoder.model.get_input_embeddings()

    def gradients() -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        cut = words.register_forward_hook(lambda *of: of[2].detach().requires_grad_())
        look = words.register_forward_hook(lambda *of: seen.append(of[2]))
        torch.cat([logits.flatten() for logits in ask(engine, rows, grad=True)]).norm().backward()
        cut.remove()
        look.remove()
        assert seen[0].grad is not None
        return [part[: row.num_tokens] for part, row in zip(seen[0].grad, rows, strict=True)]

    got = gradients()
    with padded(engine):
        assert_close(got, gradients())
    assert all(of_row.abs().max() > 1e-3 for of_row in got), "a row that has none"
