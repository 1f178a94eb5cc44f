"""Random adapters, random mixes of rows, a tiny random BERT: every row is answered as by PEFT."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from peft import PeftModel

from adapters.directory import Directory
from deployments.model.engine import Engine
from deployments.rows import Row, Tokens

TOLERANCE = 1e-4
NUM_SLOTS = 5
MAX_LABELS = 12
TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense",
           "pooler.dense", "dense")  # fmt: skip

names = itertools.count()


@dataclass(frozen=True)
class Adapter:
    """What is random about an adapter."""

    num_labels: int
    rank: int
    targets: tuple[str, ...] | str
    alpha: int
    rslora: bool
    seed: int


adapters = st.builds(
    Adapter,
    num_labels=st.integers(2, MAX_LABELS),
    rank=st.integers(1, 16),
    targets=st.lists(st.sampled_from(TARGETS), min_size=1, unique=True).map(tuple)
    | st.sampled_from(["all-linear", r".*layer\.1\..*(query|intermediate\.dense)"]),
    alpha=st.integers(1, 32),
    rslora=st.booleans(),
    seed=st.integers(0, 2**16),
)


@dataclass
class Mix:
    """Some adapters in slots of their own, and rows of any of them in any order."""

    adapters: dict[int, Adapter]
    rows: list[Row]


@st.composite
def mixes(draw: st.DrawFn) -> Mix:
    slots = draw(st.lists(st.integers(1, NUM_SLOTS), min_size=1, max_size=3, unique=True))
    seed = draw(st.integers(0, 2**16))
    shapes = st.tuples(st.sampled_from(slots), st.integers(1, 40), st.booleans())
    rows = []
    for slot, length, paired in draw(st.lists(shapes, min_size=1, max_size=12)):
        dice = random.Random(seed + len(rows))
        ids = dice.choices(range(64), k=length)
        types = [int(index >= length // 2) for index in range(length)] if paired else None
        rows.append(Row(slot, Tokens(ids, types)))
    return Mix({slot: draw(adapters) for slot in slots}, rows)


@pytest.fixture(scope="module")
def engine(tiny_base: str) -> Engine:
    return Engine(
        tiny_base,
        quantization="none",
        device="cpu",
    )


@pytest.fixture(scope="module")
def install(
    engine: Engine,
    tiny_base: str,
    make_adapter: Callable[..., PeftModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Mix], dict[int, PeftModel]]:
    """Brings a mix into the engine by way of a store; returns PEFT's model of each slot."""
    store = Directory(tmp_path_factory.mktemp("store"))

    def bring(slot: int, adapter: Adapter) -> PeftModel:
        task = f"task{next(names)}"
        peft = make_adapter(store.root / task, tiny_base, **vars(adapter))
        engine.write(slot, engine.read(store.read(task)))
        return peft

    return lambda mix: {slot: bring(slot, adapter) for slot, adapter in mix.adapters.items()}


def ask(peft: PeftModel, rows: Sequence[Row]) -> torch.Tensor:
    """PEFT's answer to the rows of one adapter."""
    width = max(row.num_tokens for row in rows)
    ids, mask, types = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
    for index, row in enumerate(rows):
        place = (index, slice(row.num_tokens))
        ids[place] = torch.tensor(row.tokens.ids)
        types[place] = torch.tensor(row.tokens.type_ids or [0] * row.num_tokens)
        mask[place] = 1
    logits: torch.Tensor = peft(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
    return logits


Install = Callable[[Mix], dict[int, PeftModel]]


@settings(max_examples=40, derandomize=True)
@given(mix=mixes())
def test_any_mix_of_rows_is_answered_as_by_peft(engine: Engine, install: Install, mix: Mix) -> None:
    pefts = install(mix)
    predictions = engine.predict(mix.rows)
    with torch.inference_mode():
        logits = engine.logits(mix.rows)
        for slot, peft in pefts.items():
            places = [index for index, row in enumerate(mix.rows) if row.slot == slot]
            if not places:
                continue
            want = ask(peft, [mix.rows[index] for index in places])
            num_labels = mix.adapters[slot].num_labels
            assert want.shape == (len(places), num_labels)
            error = (logits[places, :num_labels] - want).abs().max()
            note(f"slot {slot} differs by {error:.1e}")
            assert error <= TOLERANCE
            for place, scores in zip(places, want.softmax(dim=1), strict=True):
                prediction = predictions[place]
                assert not isinstance(prediction, Exception)
                assert prediction.scores == pytest.approx(scores.tolist(), abs=TOLERANCE)


@settings(max_examples=15, derandomize=True)
@given(mix=mixes(), data=st.data())
def test_permuted_rows_have_permuted_answers(
    engine: Engine, install: Install, mix: Mix, data: st.DataObject
) -> None:
    install(mix)
    order = data.draw(st.permutations(range(len(mix.rows))))
    with torch.inference_mode():
        logits = engine.logits(mix.rows)
        shuffled = engine.logits([mix.rows[index] for index in order])
    assert (shuffled - logits[order]).abs().max() <= 1e-5


@settings(max_examples=15, derandomize=True)
@given(mix=mixes(), widest=adapters)
def test_labels_that_an_adapter_has_not_stay_zero(
    engine: Engine, install: Install, mix: Mix, widest: Adapter
) -> None:
    widest = replace(widest, num_labels=MAX_LABELS)
    install(Mix(dict.fromkeys(mix.adapters, widest), []))  # what was in the slots before
    install(mix)
    with torch.inference_mode():
        logits = engine.logits(mix.rows)
    for row, one, prediction in zip(mix.rows, logits, engine.predict(mix.rows), strict=True):
        num_labels = mix.adapters[row.slot].num_labels
        assert not one[num_labels:].any()
        assert not isinstance(prediction, Exception)
        assert len(prediction.scores) == num_labels
        assert sum(prediction.scores) == pytest.approx(1)
