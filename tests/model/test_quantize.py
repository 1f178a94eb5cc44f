import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.nn.functional import linear as product
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from deployments.model.engine import Engine
from deployments.model.fp32 import Fp32Linear, has_onednn
from deployments.model.int8 import Int8Linear, int8_is_exact
from deployments.model.quantize import _bitsandbytes, choose, quantize
from deployments.model.sites import HeadSite

CPU, GPU = torch.device("cpu"), torch.device("cuda")
IN_FP32 = Fp32Linear if has_onednn() else nn.Linear
CLASSES = {"none": IN_FP32, "int8": Int8Linear, "nf4": bitsandbytes.nn.Linear4bit}


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 40).requires_grad_(False)


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 5, 96) * torch.logspace(-3, 2, 15).reshape(3, 5, 1)


def quantized(module: nn.Module, quantization: str) -> nn.Module:
    model = nn.Sequential(module)
    quantize(model, (), quantization, CPU)
    return model[0]


def test_int8_is_the_dequantised_product_but_for_the_rounding_of_x(
    linear: nn.Linear, x: torch.Tensor
) -> None:
    int8 = Int8Linear(linear)
    exact = product(x.double(), int8.weight.double(), linear.bias.double())
    half_step = x.abs().amax(dim=-1, keepdim=True) / 127 / 2
    bound = half_step * int8.weight.abs().sum(dim=1)
    error = (int8(x) - exact).abs()
    assert (error <= bound + 1e-5).all()
    assert error.max() > 1e-3  # it did round


def test_int8_of_what_needs_no_rounding_is_exact(linear: nn.Linear) -> None:
    int8 = Int8Linear(linear)
    whole = torch.randint(-127, 128, (7, 96)).float()
    whole[:, 0] = 127  # so that a step is 1
    exact = product(whole.double(), int8.weight.double(), linear.bias.double())
    assert (int8(whole) - exact).abs().max() <= 1e-4


def test_int8_weights_dequantise_to_within_half_a_step(linear: nn.Linear) -> None:
    int8 = Int8Linear(linear)
    step = linear.weight.abs().amax(dim=1, keepdim=True) / 127
    assert int8.weight.shape == linear.weight.shape
    assert ((int8.weight - linear.weight).abs() <= step / 2 + 1e-7).all()
    assert "weight" not in dict(int8.named_parameters()), "a float weight would take its memory"


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_gradients_reach_the_input_as_through_the_dequantised_linear(
    quantization: str, linear: nn.Linear, x: torch.Tensor
) -> None:
    layer = quantized(linear, quantization)
    with torch.inference_mode():
        layer(x)  # bitsandbytes packs its weights anew at the first inference on some CPUs
    weight = layer(torch.eye(96)).t() - linear.bias.unsqueeze(1)
    given = x.clone().requires_grad_()
    upstream = torch.randn(3, 5, 40)
    layer(given * 1).backward(upstream)
    assert given.grad is not None
    assert (given.grad - upstream @ weight).abs().max() <= 1e-4


def test_nf4_computes_in_fp32_on_a_cpu(linear: nn.Linear, x: torch.Tensor) -> None:
    layer = quantized(linear, "nf4")
    weight = layer.weight
    dequantised = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    with torch.inference_mode():
        error = (layer(x) - product(x, dequantised, linear.bias)).abs()
    assert weight.quant_state.nested, "double quantisation"
    assert (error <= 1e-5 * x.abs().amax(dim=-1, keepdim=True).clamp_min(1)).all()


def test_int8_keeps_dtype_and_shape_and_maps_zeros_to_the_bias(linear: nn.Linear) -> None:
    int8 = Int8Linear(linear)
    for dtype in (torch.float32, torch.bfloat16):
        y = int8(torch.zeros(2, 3, 4, 96, dtype=dtype))
        assert y.shape == (2, 3, 4, 40)
        assert y.dtype == dtype
        assert torch.equal(y[0, 0, 0], linear.bias.to(dtype))
    unbiased = Int8Linear(nn.Linear(96, 40, bias=False))
    assert not unbiased(torch.zeros(2, 96)).any()


def test_int8_answers_the_same_with_and_without_gradients_and_changes_nothing(
    linear: nn.Linear, x: torch.Tensor
) -> None:
    int8, given, bias = Int8Linear(linear), x.clone(), linear.bias.clone()
    answer = int8(x)
    with torch.inference_mode():
        assert torch.equal(int8(x), answer)
    assert torch.equal(x, given)
    assert torch.equal(linear.bias, bias)


@pytest.mark.skipif(not has_onednn(), reason="torch has no oneDNN here")
@pytest.mark.parametrize("with_bias", [True, False])
def test_fp32_by_onednn_is_the_linear(linear: nn.Linear, x: torch.Tensor, with_bias: bool) -> None:
    if not with_bias:
        linear.bias = None
    fast, bias = Fp32Linear(linear), linear.bias.double() if with_bias else None
    want = product(x.double(), linear.weight.double(), bias)
    for given in (x, x[0], x[0, :1], x.transpose(0, 1)):  # of any shape, and not in one piece
        with torch.inference_mode():
            got = fast(given)
        of = want if given is x else fast(given)  # with a gradient torch's own
        assert got.shape == of.shape
        assert (got - of).abs().max() <= 1e-4 * want.abs().max()
    assert fast.weight is linear.weight


@pytest.mark.skipif(not has_onednn(), reason="torch has no oneDNN here")
def test_fp32_by_onednn_has_the_gradients_of_the_linear(linear: nn.Linear, x: torch.Tensor) -> None:
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    Fp32Linear(linear)(one).square().sum().backward()
    linear(other).square().sum().backward()
    assert other.grad is not None
    assert torch.equal(one.grad, other.grad)


def test_onednn_is_used_where_it_is_fast() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert has_onednn() == (torch.backends.mkldnn.is_available() and "avx2" in flags)


@pytest.mark.parametrize("make", [nn.Linear, Conv1D])
def test_another_dtype_than_fp32_stays_as_it_is(make: Any) -> None:
    module = make(8, 4).bfloat16()
    assert quantized(module, "none") is module


@pytest.mark.skipif(not has_onednn(), reason="torch has no oneDNN here")
def test_a_conv1d_in_fp32_goes_through_onednn_too(x: torch.Tensor) -> None:
    conv = Conv1D(40, 96).requires_grad_(False)
    fast = quantized(conv, "none")
    assert isinstance(fast, Fp32Linear)
    with torch.inference_mode():
        assert (fast(x) - conv(x)).abs().max() <= 1e-4 * conv(x).abs().max()


def test_int8_treats_each_token_by_itself(linear: nn.Linear, x: torch.Tensor) -> None:
    int8, louder = Int8Linear(linear), x.clone()
    louder[1] *= 20
    assert torch.equal(int8(louder)[[0, 2]], int8(x)[[0, 2]])


@pytest.mark.parametrize("quantization", CLASSES)
def test_every_linear_but_the_skipped_ones_is_quantised(quantization: str, tiny_base: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base)
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    skipped = {"classifier", "bert.encoder.layer.1.output.dense"}
    quantize(model, skipped, quantization, CPU)
    assert len(paths) == 2 * 6 + 2
    for path in paths:
        want = nn.Linear if path in skipped else CLASSES[quantization]
        assert type(model.get_submodule(path)) is want


@pytest.mark.parametrize("quantization", CLASSES)
def test_the_engine_quantises_its_base_and_never_its_head(
    quantization: str,
    tiny_base: str,
    base_linears: Callable[[Engine], dict[str, nn.Linear]],
) -> None:
    engine = Engine(tiny_base, quantization=quantization, device="cpu")
    linears = base_linears(engine)
    assert engine.quantization == quantization
    assert len(linears) == 2 * 6 + 1
    assert {type(linear) for linear in linears.values()} == {CLASSES[quantization]}
    head = engine.encoder.model.get_submodule("classifier")
    assert type(head) is HeadSite


def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What int8 products are without VNNI: pairs of u8 x s8 are summed in 16 bits, clamped."""
    a, b = a.int() + 128, b.int()
    pairs = a.unsqueeze(2) * b.unsqueeze(0)  # [rows, in, out]
    pairs = pairs.unflatten(1, (-1, 2)).sum(dim=2).clamp(-(2**15), 2**15 - 1)
    return pairs.sum(dim=1) - 128 * b.sum(dim=0)


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.int() @ b.int()


def test_a_saturating_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    small = torch.randint(-20, 20, (32, 64)).to(torch.int8)
    assert torch.equal(saturating(small, small.t()), exact(small, small.t()))
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not int8_is_exact()
    monkeypatch.setattr(torch, "_int_mm", exact)
    assert int8_is_exact()


def test_int8_is_refused_and_not_chosen_where_products_saturate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "_int_mm", saturating)
    with pytest.raises(ValueError, match=r"would give wrong .* use quantization=none"):
        choose("int8", CPU)
    assert choose("auto", CPU) == "none"
    assert choose("int8", GPU) == "int8"


def test_auto_fits_the_device_and_what_is_asked_for_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "_int_mm", exact)
    assert choose("auto", CPU) == "int8"
    assert choose("auto", GPU) == "nf4"
    for asked in CLASSES:
        assert choose(asked, CPU) == asked
        assert choose(asked, GPU) == asked


def test_an_unknown_quantisation_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="quantization='fp8' is not one of auto, none, int8, nf4"):
        choose("fp8", CPU)


def test_int8_of_bitsandbytes_does_not_log_at_every_product_in_bf16(
    linear: nn.Linear, caplog: pytest.LogCaptureFixture
) -> None:
    casts = logging.getLogger("bitsandbytes.autograd._functions")
    for filtered in list(casts.filters):
        casts.removeFilter(filtered)
    x = torch.ones(2, 96, dtype=torch.bfloat16)
    for made, said in ((0, 1), (1, 0), (2, 0)):
        int8 = bitsandbytes.nn.Linear8bitLt(96, 40, has_fp16_weights=False)
        if made:
            int8 = _bitsandbytes(linear.to(torch.bfloat16), "int8", CPU)
        caplog.clear()
        int8.eval()(x)
        casts.warning("another")
        assert [r.message.split(":")[0] for r in caplog.records] == [
            *["MatMul8bitLt"] * said,
            "another",
        ]
    assert len(casts.filters) == 1
