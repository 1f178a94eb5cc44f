"""All of attention without padding but its kernel, which no CPU has: a plain one stands in."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_bidirectional_mask_function,
)

from deployments.model import encoder, unpadded
from deployments.model.engine import Engine
from deployments.model.unpadded import Kernel, unpad
from tests.parity.bases import BASES, FIRST_PLAIN_ID, VOCAB

CPU = torch.device("cpu")
HALF = torch.bfloat16
LENGTHS = [9, 1, 4, 12]


def row_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    starts_of_keys: torch.Tensor,
    longest: int,
    longest_of_keys: int,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `varlen_attn` documents, a row and a head at a time, in fp32; [all, heads, size]."""
    assert starts.dtype == starts_of_keys.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    answer = torch.empty(query.shape)
    for row in range(len(starts) - 1):
        mine = slice(int(starts[row]), int(starts[row + 1]))
        first, end = int(starts_of_keys[row]), int(starts_of_keys[row + 1])
        assert mine.stop - mine.start <= longest
        assert end - first <= longest_of_keys
        if seqused_k is not None:
            assert seqused_k.dtype == torch.int32
            end = first + int(seqused_k[row])
        for head in range(query.shape[1]):
            of_keys = head // (query.shape[1] // key.shape[1])
            scores = query[mine, head].float() @ key[first:end, of_keys].float().T
            weights = (scores * (scale or query.shape[-1] ** -0.5)).softmax(-1)
            answer[mine, head] = weights @ value[first:end, of_keys].float()
    return answer.to(query.dtype)


def counted(calls: list[int]) -> Kernel:
    def kernel(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(len(args[0]))
        return row_by_row(*args, **kwargs)

    return kernel


def never(*_: Any, **__: Any) -> torch.Tensor:
    raise AssertionError("the kernel was asked")


# What its two layers do: attend by the kernel, by sdpa without a mask, by sdpa with one.
EXPECTED = {
    "bert": (2, 0, 0),
    "roberta": (2, 0, 0),
    "distilbert": (2, 0, 0),
    "albert": (2, 0, 0),
    "modernbert": (1, 0, 1),  # its other layer has a sliding window
    "llama": (0, 2, 0),
    "qwen2": (0, 2, 0),
    "gpt2": (0, 2, 0),
    "mistral": (0, 0, 2),  # a sliding window
    "deberta-v3": (0, 0, 0),  # its own attention
    "mpnet": (0, 0, 0),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_base_answers_as_with_sdpa(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In fp32 what differs is a mistake, and the sums of a check of halves are not exact enough.
    monkeypatch.setattr(unpadded, "_HALVES", (torch.float32,))
    monkeypatch.setattr(unpadded, "_fault", lambda *_: None)
    (base,) = (base for base in BASES if base.name == name)
    folder = base.save("bare", tmp_path / "base")
    plain, ours = (AutoModel.from_pretrained(folder).eval() for _ in range(2))
    plain.config.use_cache = ours.config.use_cache = False  # as the encoder has it
    calls: list[int] = []
    unpad(ours, CPU, torch.float32, counted(calls))
    masks: list[torch.Tensor | None] = []

    def sdpa(*args: Any, **kwargs: Any) -> Any:
        masks.append(args[4])
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setattr(unpadded, "sdpa_attention_forward", sdpa)
    dice = torch.Generator().manual_seed(0)
    shape = (len(LENGTHS), max(LENGTHS))
    ids = torch.randint(FIRST_PLAIN_ID, VOCAB, shape, generator=dice)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    with torch.inference_mode():
        got, want = (
            model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
            for model in (ours, plain)
        )
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    without = sum(mask is None for mask in masks)
    assert (len(calls), without, len(masks) - without) == EXPECTED[name]
    assert set(calls) <= {ids.numel()}, "the tokens that it was given are not all, padded"


def no_lengths(*args: Any, seqused_k: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return row_by_row(*args, **kwargs)


def one_key_more(*args: Any, seqused_k: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    longest = torch.full_like(seqused_k, args[6])
    return row_by_row(*args, seqused_k=torch.minimum(seqused_k + 1, longest), **kwargs)


def one_key_more_of_many(*args: Any, seqused_k: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    more = ((seqused_k > 64) & (seqused_k < args[6])).int()
    return row_by_row(*args, seqused_k=seqused_k + more, **kwargs)


def one_key_less(*args: Any, seqused_k: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return row_by_row(*args, seqused_k=(seqused_k - 1).clamp(min=1), **kwargs)


def of_no_scale(*args: Any, scale: float | None = None, **kwargs: Any) -> torch.Tensor:
    return row_by_row(*args, scale=1.0, **kwargs)


def not_numbers(*args: Any, **kwargs: Any) -> torch.Tensor:
    return row_by_row(*args, **kwargs) * float("nan")


def too_old(*args: Any, scale: float | None = None) -> torch.Tensor:
    return row_by_row(*args, scale=scale)


WRONG = [
    no_lengths,
    one_key_more,
    one_key_more_of_many,
    one_key_less,
    of_no_scale,
    not_numbers,
    too_old,
    never,
]


@pytest.mark.parametrize("kernel", WRONG, ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_kernel_that_fails_or_differs_is_not_taken_and_one_line_says_so(
    name: str, kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    (base,) = (base for base in BASES if base.name == name)
    model = AutoModel.from_config(base.make_config())
    with caplog.at_level("WARNING", "ray.serve"):
        unpad(model, CPU, HALF, kernel)
    assert model.config._attn_implementation == "sdpa"
    (record,) = caplog.records
    assert record.message.startswith("attention runs over padding too, on sdpa: ")
    assert "\n" not in record.message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "qwen2"])
def test_a_kernel_that_agrees_is_taken(
    name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    (base,) = (base for base in BASES if base.name == name)
    model = AutoModel.from_config(base.make_config())
    with caplog.at_level("WARNING", "ray.serve"):
        unpad(model, CPU, dtype, row_by_row)
    assert model.config._attn_implementation == "onebase_unpadded"
    assert not caplog.records


def test_torchs_own_kernel_is_what_is_tried_and_has_none_for_a_cpu(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = AutoModel.from_config(BASES[0].make_config())
    with caplog.at_level("WARNING", "ray.serve"):
        unpad(model, CPU, HALF)
    assert model.config._attn_implementation == "sdpa"
    assert len(caplog.records) == 1


def test_in_fp32_no_kernel_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModel.from_config(BASES[0].make_config())
    unpad(model, CPU, torch.float32, never)
    assert model.config._attn_implementation == "sdpa"
    assert not caplog.records


def mask_of(real: torch.Tensor, **more: Any) -> torch.Tensor | None:
    num_rows, tokens = real.shape
    given: dict[str, Any] = {
        "batch_size": num_rows,
        "q_length": tokens,
        "kv_length": tokens,
        "q_offset": 0,
        "kv_offset": 0,
        "mask_function": bidirectional_mask_function,
        "attention_mask": real,
        "device": real.device,
    }
    return unpadded._mask(**given | more)


def parts(
    size: int = 8, dtype: torch.dtype = HALF, device: str = "cpu", tokens: int = 12
) -> list[torch.Tensor]:
    """`real`, [rows, tokens], and query, key and value, [rows, heads, tokens, size]."""
    torch.manual_seed(0)
    real = torch.arange(tokens) < torch.tensor(LENGTHS)[:, None]
    shape = (len(LENGTHS), 2, tokens, size)
    made = [torch.randn(shape).to(dtype) for _ in range(3)]
    return [part.to(device) for part in (real, *made)]


@pytest.mark.parametrize(
    "given",
    [
        {"dropout": 0.1},
        {"sliding_window": 4},
        {"position_bias": torch.ones(1, 2, 12, 12, dtype=HALF)},
        {"s_aux": torch.ones(2)},
        {"cache": object()},
        {"head_mask": torch.ones(2)},  # as whatever comes next
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_call_that_wants_more_gets_sdpa_and_the_whole_mask(given: dict[str, Any]) -> None:
    real, *qkv = parts()
    with torch.inference_mode():
        torch.manual_seed(0)
        got, _ = unpadded._attend(never, nn.Module(), *qkv, mask_of(real), **given)
        torch.manual_seed(0)
        want, _ = sdpa_attention_forward(nn.Module(), *qkv, mask_of(real), **given)
    assert torch.equal(got, want)


def test_a_softcap_is_sdpas_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(unpadded, "sdpa_attention_forward", lambda *_, **more: asked.append(more))
    real, *qkv = parts()
    with torch.inference_mode():
        unpadded._attend(never, nn.Module(), *qkv, mask_of(real), softcap=30.0)
    assert asked == [{"softcap": 30.0}]


@pytest.mark.parametrize(
    ("size", "dtype"), [(8, torch.float32), (12, HALF), (264, HALF)], ids=["fp32", "12", "264"]
)
def test_what_no_kernel_takes_gets_sdpa(size: int, dtype: torch.dtype) -> None:
    real, *qkv = parts(size, dtype)
    with torch.inference_mode():
        got, _ = unpadded._attend(never, nn.Module(), *qkv, mask_of(real))
        want, _ = sdpa_attention_forward(nn.Module(), *qkv, mask_of(real))
    assert torch.equal(got, want)


def test_gradients_flow_through_sdpa() -> None:
    real, query, key, value = parts()
    query.requires_grad_()
    unpadded._attend(never, nn.Module(), query, key, value, mask_of(real))[0].sum().backward()
    assert query.grad is not None


@pytest.mark.parametrize(
    "more",
    [
        {"mask_function": sliding_window_bidirectional_mask_function(4)},
        {"mask_function": lambda batch, head, q, k: k <= q},
        {"attention_mask": None},
        {"q_length": 1, "q_offset": 11},
        {"kv_length": 16},
    ],
    ids=["window", "own", "none", "cached", "longer"],
)
def test_a_mask_that_is_not_of_padding_alone_is_sdpas(more: dict[str, Any]) -> None:
    mask = mask_of(parts()[0], **more)
    assert getattr(mask, unpadded._TAG, None) is None


def test_a_mask_that_a_model_changed_is_no_longer_plain() -> None:
    real, *qkv = parts()
    mask = mask_of(real)
    assert mask is not None
    changed = mask & (torch.arange(12) != 2)
    with torch.inference_mode():
        got, _ = unpadded._attend(never, nn.Module(), *qkv, changed)
        want, _ = sdpa_attention_forward(nn.Module(), *qkv, changed)
    assert torch.equal(got, want)


@torch.library.custom_op("onebase_tests::row_by_row", mutates_args=())
def opaque(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """As a kernel is to a recording: it reads its tensors when it is played."""
    kwargs = {"enable_gqa": True, "seqused_k": lengths}
    return row_by_row(query, key, value, starts, starts, longest, longest, **kwargs)


@opaque.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query)


@pytest.mark.parametrize("function", [bidirectional_mask_function, causal_mask_function])
def test_what_is_recorded_with_some_lengths_answers_any_others(
    function: Callable[..., Any],
) -> None:
    real, *qkv = parts()
    module = nn.Module()
    vars(module)["is_causal"] = False  # the mask decides

    def kernel(*args: Any, seqused_k: torch.Tensor, **_: Any) -> torch.Tensor:
        return opaque(*args[:4], args[5], seqused_k)

    def work(real: torch.Tensor, *qkv: torch.Tensor) -> torch.Tensor:
        mask = mask_of(real, mask_function=function)
        return unpadded._attend(kernel, module, *qkv, mask)[0]

    with torch.no_grad():
        recorded = make_fx(work)(real, *qkv)
        for lengths in ([12, 12, 12, 12], [1, 2, 3, 4], [7, 12, 1, 5]):
            other = torch.arange(12) < torch.tensor(lengths)[:, None]
            got = recorded(other, *qkv)
            want, _ = sdpa_attention_forward(module, *qkv, mask_of(other, mask_function=function))
            assert (got - want)[other].abs().max() <= 0.02


def test_a_scale_is_the_kernels_too() -> None:
    real, *qkv = parts()
    with torch.inference_mode():
        got, _ = unpadded._attend(row_by_row, nn.Module(), *qkv, mask_of(real), scaling=2.0)
        want, _ = sdpa_attention_forward(nn.Module(), *qkv, mask_of(real), scaling=2.0)
    assert (got - want)[real].abs().max() <= 0.02


@pytest.mark.skipif(
    "seqused_k" not in inspect.signature(varlen_attn).parameters, reason="torch before 2.12"
)
def test_torchs_kernel_takes_what_it_is_given_and_no_value_is_asked_of_the_device() -> None:
    # A meta tensor has a shape and no values: what needs one raises.
    real, *qkv = parts(device="meta")
    with torch.inference_mode():
        answer, _ = unpadded._attend(varlen_attn, nn.Module(), *qkv, mask_of(real), scaling=0.5)
    assert answer.shape == (len(LENGTHS), 12, 2, 8)


def test_an_engine_tries_it_where_it_is_not_on_a_cpu(
    tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(encoder, "unpad", lambda *given: asked.append(given))
    made = Engine(tiny_base, quantization="none", device="cpu").encoder
    assert asked == []
    cuda = torch.device("cuda")
    made._prepare(cuda, HALF)
    assert asked == [(made.model, cuda, HALF)]
