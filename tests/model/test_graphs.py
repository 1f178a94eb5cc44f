"""All of graphs but CUDA's part: `again` stands for a recording, and runs the work once more."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import BertConfig, BertModel
from transformers.utils import ModelOutput

from adapters.directory import Directory
from deployments.model import graphs
from deployments.model.bank import Bank
from deployments.model.engine import Engine
from deployments.model.graphs import Captured, Work, bucket, kind_of
from deployments.rows import Row, Tokens

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("step", "counts", "buckets"),
    [
        (1, [1, 2, 7, 8, 9, 11, 16, 17, 33, 64, 65], [1, 2, 7, 8, 10, 12, 16, 20, 40, 64, 80]),
        (8, [1, 8, 9, 31, 63, 64, 65, 81, 129, 500], [8, 8, 16, 32, 64, 64, 80, 96, 160, 512]),
    ],
)
def test_sizes_are_rounded_up(step: int, counts: list[int], buckets: list[int]) -> None:
    assert [bucket(count, step) for count in counts] == buckets


def test_less_than_a_fifth_of_a_bucket_is_padding_and_there_are_few() -> None:
    sizes = [bucket(count, 1) for count in range(1, 1025)]
    assert all(count <= size < 1.25 * count for count, size in enumerate(sizes, start=1))
    assert len(set(sizes)) == 8 + 4 * 7


def test_a_kind_is_one_packing_and_one_shape_of_the_heads_within() -> None:
    bank = Bank(2**16, torch.float32, width=32, device=CPU)
    heads = {"pooler": torch.ones(4, 5), "classifier": torch.ones(2, 5)}
    more = heads | {"classifier": torch.ones(7, 5)}
    for slot, (rank, brought) in enumerate(
        [(4, heads), (4, more), (8, heads), (4, {"classifier": torch.ones(2, 5)})], start=1
    ):
        bank.write(slot, bank.pack({"l": {"lora": torch.ones(rank, 9)}}, brought))

    def kind(*slots: int, tokens: int = 20, types: bool = False) -> graphs.Kind | None:
        bank.route(slots)
        return kind_of((len(slots), tokens), bank, ["pooler"], types, 40)

    one = kind(1, 2)
    assert one is not None
    assert one[:2] == (2, 24)
    assert one.heads == (("pooler", (4, 5)),)
    assert one == kind(2, 2) == kind(1, 1, tokens=17)
    assert len({one, kind(3, 3), kind(4, 4), kind(1, 2, 1), kind(1, 2, types=True)}) == 5
    assert kind(1, 3) is None, "two packings"
    assert kind(1, 4) is None, "one with a pooler and one without"
    assert kind(1, tokens=39) == kind(1, tokens=40)
    assert kind(*[1] * 1024) is None, "too large"


def again(work: Work) -> tuple[Callable[[], None], ModelOutput]:
    output = work()

    @torch.inference_mode()  # CUDA does not ask who made a tensor
    def replay() -> None:
        for name, part in work().items():
            output[name].copy_(part)

    return replay, output


@pytest.fixture(params=[True, False], ids=["pooler", "no-pooler"])
def engine(
    request: pytest.FixtureRequest,
    save_base: Callable[..., str],
    tiny_config: BertConfig,
    make_adapter: Callable[..., PeftModel],
    tmp_path: Path,
) -> Engine:
    """Slots 1 to 5 are packed alike, with different numbers of labels; slot 6 is not.

    A pooler that the base has is a site of the encoder, and one that it lacks a head within it.
    """
    base = save_base(BertModel, tiny_config, add_pooling_layer=request.param)
    engine = Engine(base, quantization="none", device="cpu")
    assert engine.encoder._captured._within == ([] if request.param else ["bert.pooler.dense"])
    for slot in range(1, 7):
        folder = tmp_path / f"task{slot}"
        targets, saved = ("query", "value"), ["classifier", "pooler"]
        make_adapter(folder, base, 1 + slot, 4 + slot // 6, targets, seed=slot, saved=saved)
        engine.write(slot, engine.read(Directory(tmp_path).read(f"task{slot}")))
    return engine


def batches() -> list[list[Row]]:
    """Batches of slots that are packed alike, of many shapes, some with type ids."""
    dice = torch.Generator().manual_seed(0)
    found = []
    for num_rows, longest in ((1, 3), (2, 9), (5, 17), (9, 12), (9, 40), (11, 33), (10, 35)):
        rows = []
        for index in range(num_rows):
            length = 1 + int(torch.randint(longest, (), generator=dice)) if index else longest
            ids = torch.randint(5, 60, (length,), generator=dice).tolist()
            types = [0] * (length // 2) + [1] * (length - length // 2) if longest % 2 else None
            rows.append(Row(1 + index % 5, Tokens(ids, types)))
        found.append(rows)
    return found


def test_a_graph_answers_as_the_encoder_does(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_AFTER", 1)
    captured: Captured = engine.encoder._captured
    with torch.inference_mode():
        eager = [engine.logits(rows) for rows in batches()]
    recorded = []
    captured.record = lambda work: recorded.append(work) or again(work)
    encode = engine.encoder.model.base_model.forward
    direct = []
    for guard in (torch.inference_mode, torch.no_grad):
        with guard():
            for rows, want in zip(batches(), eager, strict=True):
                got = engine.logits(rows)
                assert (got - want).abs().max() <= 1e-5
                # The same recording, of other adapters and other inputs.
                turned = [Row(1 + row.slot % 5, row.tokens) for row in reversed(rows)]
                got = engine.logits(turned)
                captured.record, kept = None, captured.record
                want = engine.logits(turned)
                captured.record = kept
                assert (got - want).abs().max() <= 1e-5
    assert len(recorded) == len(captured._graphs) == 7
    monkeypatch.setattr(
        engine.encoder.model.base_model, "forward", lambda **g: direct.append(1) or encode(**g)
    )
    with torch.inference_mode():
        engine.logits([Row(1, Tokens([5, 6])), Row(6, Tokens([5, 6]))])
    assert len(recorded) == 7, "of two packings"
    engine.logits([Row(1, Tokens([5, 6]))])
    assert len(recorded) == 7, "with gradients"
    assert len(direct) == 2


def test_an_adapter_written_over_another_is_what_a_graph_reads(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_AFTER", 1)
    engine.encoder._captured.record = again
    rows = [Row(slot, Tokens([7, 8, 9])) for slot in (1, 2)]
    with torch.inference_mode():
        before = engine.logits(rows)
        engine.write(1, engine.read(Directory(tmp_path).read("task2")))
        after = engine.logits(rows)
    assert (after[0] - after[1]).abs().max() <= 1e-6
    assert (before[0] - after[0]).abs().max() > 1e-3


def test_only_what_comes_often_is_recorded_and_the_one_unused_for_longest_goes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    captured = engine.encoder._captured
    recorded: list[int] = []

    def record(work: Work) -> tuple[Callable[[], None], ModelOutput]:
        replay, output = again(work)
        recorded.append(len(output[0]))
        return replay, output

    captured.record = record

    def ask(count: int, times: int) -> None:
        with torch.inference_mode():
            for _ in range(times):
                engine.logits([Row(1, Tokens([5, 6]))] * count)

    ask(1, 7)
    assert recorded == []
    ask(1, 1)
    ask(2, 8)
    ask(1, 1)
    ask(3, 8)
    assert recorded == [1, 2, 3]
    assert [kind.num_rows for kind in captured._graphs] == [1, 3]
    ask(2, 7)
    assert recorded == [1, 2, 3]
    ask(2, 1)
    assert recorded == [1, 2, 3, 2]


def test_a_base_that_cannot_be_recorded_says_so_once_and_answers(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs, "_AFTER", 1)
    rows = [Row(slot, Tokens([7, 8, 9])) for slot in (1, 2)]
    with torch.inference_mode():
        want = engine.logits(rows)
        calls = []

        def fails(work: Work) -> tuple[Callable[[], None], ModelOutput]:
            calls.append(work())
            raise RuntimeError("operation not permitted when stream is capturing")

        engine.encoder._captured.record = fails
        with caplog.at_level("WARNING", "ray.serve"):
            for _ in range(3):
                assert torch.equal(engine.logits(rows), want)
    assert len(calls) == 1
    assert [r.message for r in caplog.records] == [
        "this base runs without CUDA graphs: "
        "RuntimeError('operation not permitted when stream is capturing')"
    ]
