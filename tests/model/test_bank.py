from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from adapters.directory import Directory
from deployments.model.bank import Bank
from deployments.model.engine import Engine
from deployments.model.packing import Packed
from deployments.model.sites import EmbeddingSite, HeadSite, LinearSite, ShiftSite, Site
from deployments.rows import Row, Tokens

CPU = torch.device("cpu")
BODY = {"a": {"matrix": (4, 50), "vector": (5,)}, "b": {"matrix": (3, 7)}}


@pytest.fixture
def bank() -> Bank:
    """Forty pages of 64 bytes."""
    return Bank(40 * 64, torch.float32, width=32, device=CPU)


def pack(bank: Bank, value: float, labels: int = 3, rank: int = 4) -> Packed:
    body = {
        path: {name: torch.full((rank, *shape[1:]), value) for name, shape in of.items()}
        for path, of in BODY.items()
    }
    return bank.pack(body, {"head": torch.full((labels, 9), value)})


def numbers(tensor: torch.Tensor) -> list[set[float]]:
    return [set(row.flatten().tolist()) for row in tensor]


def test_each_row_reads_what_was_written_to_its_slot(bank: Bank) -> None:
    bank.write(1, pack(bank, 1.5))
    bank.write(2, pack(bank, -2))
    bank.route([2, 1, 2])
    (run,) = bank.runs
    for of in run.sites.values():
        for part in of.values():
            tensors = bank.gather(run, part)
            assert tensors.shape == (3, *part.shape)
            assert tensors.dtype == torch.float32
            assert numbers(tensors) == [{-2}, {1.5}, {-2}]
    ((at, heads),) = bank.gather_head("head")
    assert at == [0, 1, 2]
    assert numbers(heads) == [{-2}, {1.5}, {-2}]


def test_an_adapter_takes_its_own_bytes_and_what_is_left_of_a_page(bank: Bank) -> None:
    packed = pack(bank, 1)
    pages = [4 * 50 * 4, 4 * 4, 4 * 7 * 4, 3 * 9 * 4]
    assert len(packed.pages) == sum(-(-num_bytes // 64) for num_bytes in pages)
    assert bank.page_bytes == 64
    assert bank.num_pages == 40


def test_what_the_bank_computes_in_is_what_it_holds() -> None:
    bank = Bank(100 * 64, torch.bfloat16, width=64, device=CPU)
    bank.write(1, pack(bank, 1 + 2**-10))
    bank.route([1])
    tensors = bank.gather(bank.runs[0], bank.runs[0].sites["a"]["matrix"])
    assert tensors.dtype == torch.bfloat16
    assert numbers(tensors) == [{1}]
    ((_, heads),) = bank.gather_head("head")
    assert numbers(heads) == [{1 + 2**-10}], "heads are fp32"


def test_a_slot_written_again_has_nothing_of_what_it_had(bank: Bank) -> None:
    bank.write(1, pack(bank, 9))
    bank.write(1, pack(bank, 1, rank=1))
    bank.route([1])
    run = bank.runs[0]
    assert numbers(bank.gather(run, run.sites["a"]["matrix"])) == [{1}]
    assert run.sites["a"]["matrix"].shape == (1, 50)
    assert bank._free.num_free == 40 - len(pack(bank, 1, rank=1).pages)


@pytest.mark.parametrize("slot", [0, -1])
def test_slot_0_is_nobody_s(bank: Bank, slot: int) -> None:
    with pytest.raises(ValueError, match=rf"slot {slot} is not 1 or more"):
        bank.write(slot, pack(bank, 1))


def test_a_bank_that_is_full_says_so_and_leaves_the_others_alone(bank: Bank) -> None:
    bank.write(1, pack(bank, 1))
    with pytest.raises(MemoryError, match="pages are asked for"):
        bank.write(2, pack(bank, 2, labels=200))
    bank.route([1])
    assert numbers(bank.gather(bank.runs[0], bank.runs[0].sites["b"]["matrix"])) == [{1}]


def test_an_adapter_in_pieces_is_read_as_one_that_lies_together(bank: Bank) -> None:
    for slot in (1, 2, 3, 4, 5, 6, 7):
        bank.write(slot, bank.pack({"a": {"matrix": torch.full((4, 16), float(slot))}}, {}))
    for slot in (2, 4, 6):
        bank.forget(slot)
    values = torch.arange(350.0).reshape(7, 50)
    bank.write(8, bank.pack({"a": {"matrix": values}}, {}))
    assert len(bank._seats[8].pieces) > 1
    for slots in ([8], [8, 8], [8, 1], [3, 8, 5]):
        bank.route(slots)
        for run in bank.runs:
            tensors = bank.gather(run, run.sites["a"]["matrix"])
            for slot, tensor in zip(slots[run.rows], tensors, strict=True):
                want = values if slot == 8 else torch.full((4, 16), float(slot))
                assert torch.equal(tensor, want)


def test_rows_packed_alike_make_one_run(bank: Bank) -> None:
    for slot, rank in enumerate((1, 2, 1, 2), start=1):
        bank.write(slot, pack(bank, slot, labels=slot, rank=rank))
    bank.route([1, 3, 2, 4, 1])
    assert [run.rows for run in bank.runs] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    ranks = [run.sites["a"]["matrix"].shape[0] for run in bank.runs]
    assert ranks == [1, 2, 1], "no row is lengthened to another's rank"
    order = sorted([1, 2, 3, 4], key=bank.likeness)
    bank.route(order)
    assert len(bank.runs) == 2


def test_heads_of_like_size_are_read_together_and_a_small_one_apart_from_a_large(
    bank: Bank,
) -> None:
    sizes = {1: 2, 2: 5, 3: 30, 4: 2}
    for slot, labels in sizes.items():
        bank.write(slot, bank.pack({}, {"head": torch.full((labels, 9), float(slot))}))
    slots = [1, 3, 2, 4]
    bank.route(slots)
    read = dict[int, torch.Tensor]()
    for at, heads in bank.gather_head("head"):
        assert heads.shape[1] == max(sizes[slots[index]] for index in at)
        read |= dict(zip(at, heads, strict=True))
    assert len({len(head) for head in read.values()}) == 2
    for index, slot in enumerate(slots):
        labels = sizes[slot]
        assert (read[index][:labels] == slot).all()
        assert not read[index][labels:].any(), "labels beyond its own are zero"
    assert list(bank.gather_head("other")) == []


def test_entries_of_a_matrix_are_each_row_s_own(bank: Bank) -> None:
    matrices = {slot: torch.rand(23, 5) for slot in (1, 2, 3)}
    for slot, matrix in matrices.items():
        bank.write(slot, bank.pack({"e": {"m": matrix}}, {}))
    ids = torch.randint(23, (4, 6))
    for slots in ([1, 2, 3, 1], [2, 2, 2, 2]):
        bank.route(slots)
        (run,) = bank.runs
        got = bank.entries(run, run.sites["e"]["m"], ids)
        want = torch.stack([matrices[s][row] for s, row in zip(slots, ids, strict=True)])
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(6, 9, 48), (6, 48)], ids=["tokens", "pooled"])
def test_a_row_has_the_same_bits_in_a_batch_of_one_adapter_and_in_a_mixed_one(
    shape: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    bank = Bank(2**20, torch.float32, width=48, device=CPU)
    sites = LinearSite(nn.Linear(48, 64), "l", bank), HeadSite(nn.Linear(48, 7), "h", bank)
    for slot, rank in ((1, 8), (2, 8), (3, 3)):
        own = {"lora": torch.randn(rank, 48 + 64), "gain": torch.randn(64)}
        bank.write(slot, bank.pack({"l": own}, {"h": torch.randn(7, 49)}))
    x = torch.randn(shape)
    for site in sites:
        bank.route([2] * 6)
        alike = site(x)
        for slots in ([1, 2, 3, 2, 1, 2], [3, 2, 1, 2, 1, 2]):
            bank.route(slots)
            mixed = site(x)
            assert torch.equal(alike[[1, 3, 5]], mixed[[1, 3, 5]])
            assert (alike[0] - mixed[0]).abs().max() > 0.1


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("part", ["lora 1", "lora 8", "whole", "embedding"])
def test_a_row_alone_in_its_packing_has_the_bits_that_it_has_among_others(
    part: str, num_threads: int
) -> None:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    bank = Bank(2**22, torch.float32, width=384, device=CPU)
    if part == "embedding":
        site: Site = EmbeddingSite(nn.Embedding(50, 384), "l", bank)
        own = {"lora_A": torch.randn(50, 8), "lora_B": torch.randn(8, 384)}
    else:
        site = LinearSite(nn.Linear(384, 384), "l", bank)
        own = {"weight": torch.randn(384, 384), "bias": torch.randn(384)}
    if part.startswith("lora"):
        own = {"lora": torch.randn(int(part.split()[1]), 768)}
    bank.write(1, bank.pack({"l": own}, {}))
    try:
        for num_tokens in range(1, 14):
            x = torch.randn(4, num_tokens, 384)
            if part == "embedding":
                x = torch.randint(50, (4, num_tokens))
            bank.route([1, 1, 1, 1])
            among = site(x)[0]
            for slots in ([1, 0, 0, 0], [1, 0, 1, 1], [1, 1, 0, 1]):
                bank.route(slots)
                assert torch.equal(site(x)[0], among), (num_tokens, slots)
            bank.route([1])
            assert (site(x[:1])[0] - among).abs().max() <= 1e-4
    finally:
        torch.set_num_threads(before)


def test_a_pooled_input_is_answered_as_a_single_token() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 6)
    bank = Bank(2**16, torch.float32, width=8, device=CPU)
    site = LinearSite(linear, "l", bank)
    a, b = torch.randn(2, 8, 3), torch.randn(2, 3, 6)
    for slot in (1, 2):
        lora = torch.cat([a[slot - 1].t(), b[slot - 1]], dim=1)
        bank.write(slot, bank.pack({"l": {"lora": lora}}, {}))
    x = torch.randn(2, 8)
    bank.route([2, 1])
    want = linear(x) + torch.stack([x[0] @ a[1] @ b[1], x[1] @ a[0] @ b[0]])
    assert (site(x) - want).abs().max() <= 1e-5
    assert (site(x.unsqueeze(1)).squeeze(1) - want).abs().max() <= 1e-5


@pytest.fixture
def engine(tiny_base: str, make_adapter: Callable[..., PeftModel], tmp_path: Path) -> Engine:
    """Slot 1 has LoRA on `query` alone, slot 2 on `value` and `query` of the second layer."""
    engine = Engine(tiny_base, quantization="none", device="cpu")
    store = Directory(tmp_path)
    for slot, targets in enumerate((["query"], r".*(value|1\.attention\.self\.query)"), start=1):
        make_adapter(tmp_path / f"task{slot}", tiny_base, 3, targets=targets)
        engine.write(slot, engine.read(store.read(f"task{slot}")))
    return engine


@pytest.mark.parametrize(
    ("slots", "num_products", "num_by_row"),
    [([1, 1], 2, 4), ([2], 3, 3), ([1, 2], 5, 5), ([2, 1, 1], 5, 7)],
)
@pytest.mark.parametrize("ragged", [True, False])
def test_a_site_that_no_row_of_the_batch_uses_does_not_run(
    engine: Engine,
    slots: list[int],
    num_products: int,
    num_by_row: int,
    ragged: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert engine.encoder.is_ragged
    engine.encoder.is_ragged = ragged
    if ragged:
        num_products = num_by_row
    products = []
    name = "addmm_" if ragged else "baddbmm_"
    real = getattr(torch.Tensor, name)
    monkeypatch.setattr(torch.Tensor, name, lambda *given: products.append(1) or real(*given))
    with torch.inference_mode():
        engine.logits([Row(slot, Tokens([5, 6, 7])) for slot in slots])
    assert len(products) == num_products


def test_no_site_keeps_weights_beside_the_bank(engine: Engine) -> None:
    sites = [m for m in engine.encoder.model.modules() if isinstance(m, (Site, HeadSite))]
    num_linears, num_embeddings, num_norms = 2 * 6 + 1, 1, 2 * 2 + 1
    num_sites = num_linears + num_embeddings + num_norms
    assert len(engine.encoder.geometry.sites) == num_sites == len(sites) - 1
    assert sum(isinstance(site, LinearSite) for site in sites) == num_linears
    assert sum(isinstance(site, ShiftSite) for site in sites) == num_norms
    for site in sites:
        assert site.bank is engine.encoder.bank
        # What it has of its own is the module of the base.
        kept = [n for n, _ in site.named_parameters()] + [n for n, _ in site.named_buffers()]
        assert all(name.startswith("module.") for name in kept)
    assert not [n for n, _ in engine.encoder.model.named_parameters() if "classifier" in n]
