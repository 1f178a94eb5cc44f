from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from adapters.store import Store
from deployments.model.bank import Bank, Field
from deployments.model.engine import Engine
from deployments.model.sites import HeadSite, LinearSite, ShiftSite
from deployments.rows import Row, Tokens

CPU = torch.device("cpu")
FIELDS = (
    Field("odd", (3,), torch.bfloat16),  # 6 bytes: what follows must not lie across them
    Field("matrix", (4, 5), torch.float32),
    Field("bias", (5,), torch.float32),
)


@pytest.fixture
def bank() -> Bank:
    return Bank(FIELDS, num_slots=4, device=CPU)


def full(value: float) -> dict[str, torch.Tensor]:
    return {field.name: torch.full(field.shape, value) for field in FIELDS}


def put(bank: Bank, slot: int, tensors: dict[str, torch.Tensor]) -> None:
    bank.write(slot, bank.pack(tensors), tensors)


def test_a_view_shows_what_was_written_to_each_slot_and_only_there(bank: Bank) -> None:
    views = {field.name: bank.view(field.name) for field in FIELDS}  # made before the writes
    put(bank, 1, full(1.5))
    put(bank, 3, full(-2))
    for field in FIELDS:
        view = views[field.name]
        assert view.shape == (4, *field.shape)
        assert view.dtype == field.dtype
        assert [set(slot.flatten().tolist()) for slot in view] == [{0}, {1.5}, {0}, {-2}]


def test_a_smaller_tensor_lies_in_the_corner_and_leaves_nothing_of_the_one_before(
    bank: Bank,
) -> None:
    put(bank, 2, full(9))
    put(bank, 2, {"matrix": torch.arange(1.0, 7).reshape(2, 3)})
    want = torch.zeros(4, 5)
    want[:2, :3] = torch.arange(1.0, 7).reshape(2, 3)
    assert torch.equal(bank.view("matrix")[2], want)
    assert not bank.view("bias")[2].any()
    assert not bank.view("odd")[2].any()


def test_a_tensor_over_its_field_is_not_packed(bank: Bank) -> None:
    with pytest.raises(RuntimeError):
        bank.pack({"matrix": torch.ones(4, 6)})


@pytest.mark.parametrize("slot", [0, -1, 4])
def test_neither_the_zero_adapter_nor_a_slot_beyond_the_last_can_be_written(
    bank: Bank, slot: int
) -> None:
    with pytest.raises(ValueError, match=rf"slot {slot} is not one of 1…3"):
        bank.write(slot, bank.pack(full(1)), full(1))
    assert not bank.memory.any()


def test_all_fields_of_all_slots_are_one_tensor_and_every_field_is_aligned(bank: Bank) -> None:
    assert bank.memory.shape == (4, bank.row_bytes)
    assert bank.row_bytes == 16 + 80 + 32
    start = bank.memory.data_ptr()
    for field, offset in zip(FIELDS, (0, 16, 96), strict=True):
        assert bank.view(field.name).data_ptr() == start + offset


def test_a_route_says_which_slots_answer_and_which_fields_they_fill(bank: Bank) -> None:
    put(bank, 1, {"matrix": torch.ones(4, 5)})
    put(bank, 2, {"bias": torch.ones(5)})
    mixed = bank.route([2, 1, 2])
    assert bank.batch is mixed
    assert mixed.slots.tolist() == [2, 1, 2]
    assert mixed.only is None
    assert mixed.fields == {"matrix", "bias"}
    lone = bank.route([2, 2])
    assert (lone.only, lone.fields) == (2, {"bias"})
    put(bank, 2, {"odd": torch.ones(3)})
    assert bank.route([2]).fields == {"odd"}
    assert bank.route([0, 3]).fields == frozenset()


def test_gather_gives_each_row_the_entry_of_its_slot(bank: Bank) -> None:
    for slot in (1, 2, 3):
        put(bank, slot, full(slot))
    view = bank.view("matrix")
    bank.route([3, 1, 3])
    assert bank.gather(view)[:, 0, 0].tolist() == [3, 1, 3]
    bank.route([2, 2, 2])
    alike = bank.gather(view)
    assert alike.shape == (3, 4, 5)
    assert (alike == 2).all()
    assert alike.data_ptr() == view[2].data_ptr(), "rows of one slot share it, uncopied"


@pytest.mark.parametrize("shape", [(6, 9, 48), (6, 48)], ids=["tokens", "pooled"])
def test_a_row_has_the_same_bits_in_a_batch_of_one_adapter_and_in_a_mixed_one(
    shape: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    linear, head = nn.Linear(48, 64), nn.Linear(48, 7)
    fields = (*LinearSite.fields(linear, "l", torch.float32, 8), *HeadSite.fields(head, "h", None))
    bank = Bank(fields, num_slots=4, device=CPU)
    sites = LinearSite(linear, "l", bank, torch.float32, 8), HeadSite(head, "h", bank, None)
    for slot in (1, 2, 3):
        put(bank, slot, {field.name: torch.randn(field.shape) for field in fields})
    x = torch.randn(shape)
    for site in sites:
        bank.route([2] * 6)
        alike = site(x)
        bank.route([1, 2, 3, 2, 1, 2])
        mixed = site(x)
        assert torch.equal(alike[[1, 3, 5]], mixed[[1, 3, 5]])
        assert (alike[0] - mixed[0]).abs().max() > 0.1


def test_a_pooled_input_is_answered_as_a_single_token() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 6)
    bank = Bank(LinearSite.fields(linear, "l", torch.float32, 3), num_slots=3, device=CPU)
    site = LinearSite(linear, "l", bank, torch.float32, 3)
    a, b = torch.randn(2, 8, 3), torch.randn(2, 3, 6)
    for slot in (1, 2):
        put(bank, slot, {"l.lora_A": a[slot - 1], "l.lora_B": b[slot - 1]})
    x = torch.randn(2, 8)
    bank.route([2, 1])
    want = linear(x) + torch.stack([x[0] @ a[1] @ b[1], x[1] @ a[0] @ b[0]])
    assert (site(x) - want).abs().max() <= 1e-5
    assert (site(x.unsqueeze(1)).squeeze(1) - want).abs().max() <= 1e-5


@pytest.fixture
def engine(tiny_base: str, make_adapter: Callable[..., PeftModel], tmp_path: Path) -> Engine:
    """Slot 1 has LoRA on `query` alone, slot 2 on `value` and `query` of the second layer."""
    engine = Engine(tiny_base, quantization="none", device="cpu", adapter_slots=2)
    store = Store(tmp_path)
    for slot, targets in enumerate((["query"], r".*(value|1\.attention\.self\.query)"), start=1):
        make_adapter(tmp_path / f"task{slot}", tiny_base, 3, targets=targets)
        engine.write(slot, engine.read(store.read(f"task{slot}")))
    return engine


@pytest.mark.parametrize(
    ("slots", "num_products"), [([1, 1], 2), ([2], 3), ([1, 2], 4), ([2, 1, 1], 4)]
)
def test_a_site_that_no_row_of_the_batch_uses_does_not_run(
    engine: Engine, slots: list[int], num_products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = []
    real = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *given: products.append(1) or real(*given))
    with torch.inference_mode():
        engine.logits([Row(slot, Tokens([5, 6, 7])) for slot in slots])
    assert len(products) == num_products


def test_all_sites_of_an_engine_read_one_tensor(engine: Engine) -> None:
    memory = engine.encoder.bank.memory
    kinds = (LinearSite, ShiftSite, HeadSite)
    sites = [m for m in engine.encoder.model.modules() if isinstance(m, kinds)]
    num_linears, num_norms = 2 * 6 + 1, 2 * 2 + 1
    assert len(engine.encoder.geometry.sites) == num_linears + num_norms == len(sites) - 1
    for site in sites:
        if isinstance(site, LinearSite):
            read = [site.a, site.b, *(view for _, view in site.vectors.values())]
            assert len(read) == 6
        else:
            read = [site.shift] if isinstance(site, ShiftSite) else [site.weight, site.bias]
        for view in read:
            assert view.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    # The only parameters are the base's own: no site keeps weights beside the bank.
    assert not [n for n, _ in engine.encoder.model.named_parameters() if "classifier" in n]
