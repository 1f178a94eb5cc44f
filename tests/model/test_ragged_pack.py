"""Rows are put behind one another, and padded again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deployments.model import ragged as module
from deployments.model.ragged import Ragged, ragged


@contextmanager
def batch_of(lengths: Sequence[int], more: int = 0) -> Iterator[tuple[Ragged, torch.Tensor]]:
    mask = torch.arange(max(lengths) + more) < torch.tensor(lengths).unsqueeze(1)
    with ragged(mask.long(), [{}] * len(lengths)):
        batch = module._running.get()
        assert batch is not None
        yield batch, mask
    assert module._running.get() is None


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    more=st.integers(0, 3),
    size=st.sampled_from([(), (5,)]),
)
def test_rows_are_put_behind_one_another_and_padded_again(
    lengths: list[int], more: int, size: tuple[int, ...]
) -> None:
    num_tokens = sum(lengths)
    rounded_up = -(-num_tokens // 4) * 4
    assume(len(lengths) == 1 or max(lengths) + more != rounded_up)
    with batch_of(lengths, more) as (batch, mask):
        own, shared = torch.randn(*mask.shape, *size), torch.randn(1, mask.shape[1], *size)
        mine, (of_all, nothing) = batch.pack((own, (shared, None)))
        assert mine.shape[1] == of_all.shape[1] == rounded_up
        assert torch.equal(mine[0, :num_tokens], own[mask])
        beside = torch.cat([shared[0, :length] for length in lengths])
        assert torch.equal(of_all[0, :num_tokens], beside)
        for row, (span, length) in enumerate(zip(batch.spans, lengths, strict=True)):
            assert torch.equal(mine[0, span], own[row, :length])
        again, (of_each, same) = batch.pad((mine, (of_all, nothing)))
        assert nothing is same is None
        assert torch.equal(again[mask], own[mask])
        assert not again[~mask].any()
        assert torch.equal(batch.pack(of_each), of_all)


@pytest.mark.parametrize(
    ("num_tokens", "rounded_up"), [(1, 4), (61, 64), (64, 64), (65, 80), (81, 96), (1020, 1024)]
)
def test_many_tokens_are_rounded_up_further(num_tokens: int, rounded_up: int) -> None:
    with batch_of([num_tokens]) as (batch, _):
        assert batch.num_tokens == num_tokens
        assert len(batch.real) == rounded_up


def test_a_batch_as_wide_as_all_its_tokens_stays_padded() -> None:
    mask = (torch.arange(16) < torch.tensor([[6], [9]])).long()
    with ragged(mask, [{}, {}]):  # 15 tokens, and one more
        assert module._running.get() is None


def test_masks_and_what_has_no_tokens_are_left_alone() -> None:
    with batch_of([3, 1, 4]) as (batch, _):
        shapes = [(3, 1, 4, 4), (1, 1, 4, 4), (3, 4, 2, 2), (4,), (3, 5), (2, 4, 6), (4, 4), ()]
        for thing in (*(torch.zeros(shape) for shape in shapes), None, True, 0.5, "x", [1], {}):
            assert batch.pack(thing) is thing
        for thing in (torch.zeros(3, 4, 6), torch.zeros(1, 4, 6), torch.zeros(2, 8), None, "x"):
            assert batch.pad(thing) is thing
