"""CUDA graphs of the encoder: its hundreds of small kernels are one launch.

A graph is a recording with fixed shapes and addresses. So a batch is padded to one of few shapes,
and what differs between batches of one shape (ids, mask, each row's pages) is copied to where the
recorded kernels read it. Which sites run is recorded too: a graph serves one `Packing`.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import ModelOutput

from deployments.model.bank import Bank, Run, Seat
from deployments.model.packing import Packing, Part
from deployments.model.sites import HeadSite

logger = logging.getLogger("ray.serve")

MAX_TOKENS = 8192  # of a batch, padded: a larger one keeps a device busy without
MAX_GRAPHS = 16
_AFTER = 8  # batches of a kind: recording takes longer than a few forwards
_MAX_ASKED = 1024

Work = Callable[[], ModelOutput]
# Runs work, and returns what does the same again, and the output that this fills.
Record = Callable[[Work], tuple[Callable[[], None], ModelOutput]]


class Kind(NamedTuple):
    """What batches have in common that one graph serves.

    Attributes:
        num_rows: Rows, padded.
        num_tokens: Tokens, padded.
        packing: Of all rows.
        heads: Name and shape of each head module inside the encoder (a pooler) that rows bring.
        has_type_ids: Whether there are type ids.
    """

    num_rows: int
    num_tokens: int
    packing: Packing
    heads: tuple[tuple[str, tuple[int, ...]], ...]
    has_type_ids: bool


def bucket(count: int, step: int) -> int:
    """Round up to a multiple of a step, and beyond eight steps to one of four sizes an octave."""
    step = max(step, 2 ** max(0, (count - 1).bit_length() - 3))
    return -(-count // step) * step


def kind_of(
    shape: Sequence[int],
    bank: Bank,
    within: Sequence[str],
    has_type_ids: bool,
    max_positions: int | None,
) -> Kind | None:
    """Return the kind of the batch that is routed, None if no graph serves it.

    Args:
        shape: (rows, tokens) of the batch.
        bank: What its rows read.
        within: Names of the head modules inside the encoder.
        has_type_ids: Whether there are type ids.
        max_positions: Most tokens that the base takes.
    """
    num_rows, num_tokens = bucket(shape[0], 1), bucket(shape[1], 8)
    if max_positions is not None:
        num_tokens = min(num_tokens, max_positions)
    if num_rows * num_tokens > MAX_TOKENS or len(bank.runs) != 1:
        return None
    heads = {
        tuple((name, seat.heads[name].shape) for name in within if name in seat.heads)
        for seat in {id(seat): seat for seat in bank.rows}.values()
    }
    if len(heads) != 1:
        return None
    return Kind(num_rows, num_tokens, bank.rows[0].packing, heads.pop(), has_type_ids)


class Captured:
    """The graphs of one encoder, at most `MAX_GRAPHS`; the one unused for longest goes first."""

    def __init__(
        self, encoder: nn.Module, bank: Bank, pad_id: int, max_positions: int | None
    ) -> None:
        """Begin without graphs, and record none before `record` is set.

        Args:
            encoder: The base without its head, its sites installed.
            bank: What they read.
            pad_id: Any id of the vocabulary.
            max_positions: Most tokens that the base takes.
        """
        self.record: Record | None = None
        self._encoder = encoder
        self._bank = bank
        self._pad_id = pad_id
        self._max_positions = max_positions
        self._within = [m.name for m in encoder.modules() if isinstance(m, HeadSite)]
        self._graphs: OrderedDict[Kind, _Graph] = OrderedDict()
        self._asked: Counter[Kind] = Counter()

    def run(
        self, ids: torch.Tensor, mask: torch.Tensor, type_ids: torch.Tensor | None
    ) -> ModelOutput | None:
        """Encode the batch that is routed, or return None if the encoder itself must.

        Args:
            ids: [rows, tokens], int64.
            mask: [rows, tokens], int64.
            type_ids: [rows, tokens], int64.

        Returns:
            What the encoder gives, valid until the next run.
        """
        if self.record is None or torch.is_grad_enabled():
            return None
        kind = kind_of(
            ids.shape, self._bank, self._within, type_ids is not None, self._max_positions
        )
        graph = None if kind is None else self._find(kind)
        return None if graph is None else graph.run(ids, mask, type_ids)

    def _find(self, kind: Kind) -> _Graph | None:
        """Return a kind's graph, recording it if it has been asked for often enough."""
        assert self.record is not None
        if kind in self._graphs:
            self._graphs.move_to_end(kind)
            return self._graphs[kind]
        if len(self._asked) == _MAX_ASKED:
            self._asked.clear()
        self._asked[kind] += 1
        if self._asked[kind] < _AFTER:
            return None
        del self._asked[kind]
        if len(self._graphs) == MAX_GRAPHS:
            self._graphs.popitem(last=False)
        try:
            self._graphs[kind] = _Graph(kind, self._encoder, self._bank, self._pad_id, self.record)
        except Exception as error:
            logger.warning("this base runs without CUDA graphs: %r", error)
            self.record = None
            self._graphs.clear()
            return None
        return self._graphs[kind]


class _Graph:
    """One recording, and the tensors that it reads and fills."""

    def __init__(
        self, kind: Kind, encoder: nn.Module, bank: Bank, pad_id: int, record: Record
    ) -> None:
        """Record the encoder over rows of page 0, which add nothing."""
        self._bank = bank
        self._heads: dict[str, Part] = {}
        num_of_heads = 0
        for name, _ in kind.heads:
            part = next(seat.heads[name] for seat in bank.rows)
            pages = slice(num_of_heads, num_of_heads + part.pages.stop - part.pages.start)
            self._heads[name], num_of_heads = Part(pages, part.shape), pages.stop
        # Outside of inference mode a tensor that was made in it may not be written.
        with torch.inference_mode(False):
            self._make_inputs(kind, pad_id, num_of_heads)
        rows = [
            Seat(kind.packing, self._heads, (), body, head)
            for body, head in zip(self._body, self._head, strict=True)
        ]
        runs = [Run(slice(0, kind.num_rows), kind.packing.sites, self._body, None)]
        given = {"input_ids": self._ids, "attention_mask": self._mask}
        if kind.has_type_ids:
            given["token_type_ids"] = self._type_ids

        def work() -> ModelOutput:
            routed = bank.rows, bank.runs
            bank.rows, bank.runs = rows, runs
            try:
                output: ModelOutput = encoder(**given)
            finally:
                bank.rows, bank.runs = routed
            return output

        self._replay, self._output = record(work)
        for name, tensor in _tensors(self._output).items():
            if tensor.shape[:1] != self._ids.shape[:1] or (
                tensor.ndim > 2 and tensor.shape[:2] != self._ids.shape
            ):
                raise ValueError(f"{name} is {list(tensor.shape)} for ids {list(self._ids.shape)}")

    def _make_inputs(self, kind: Kind, pad_id: int, num_of_heads: int) -> None:
        shape, device = (kind.num_rows, kind.num_tokens), self._bank.memory.device
        self._ids = torch.full(shape, pad_id, device=device)
        self._mask = torch.ones(shape, dtype=torch.int64, device=device)
        self._type_ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self._pad_id = pad_id
        table = torch.zeros(
            kind.num_rows, kind.packing.num_pages + num_of_heads, dtype=torch.int64, device=device
        )
        self._body, self._head = table.tensor_split([kind.packing.num_pages], dim=1)

    def run(
        self, ids: torch.Tensor, mask: torch.Tensor, type_ids: torch.Tensor | None
    ) -> ModelOutput:
        """Encode the batch that is routed; see `Captured.run`."""
        (run,) = self._bank.runs
        _fill(self._ids, ids, self._pad_id)
        _fill(self._mask, mask, 0)
        if type_ids is not None:
            _fill(self._type_ids, type_ids, 0)
        _fill(self._body, run.table.expand(len(ids), -1))
        for name, part in self._heads.items():
            tables = [seat.head[seat.heads[name].pages] for seat in self._bank.rows]
            _fill(self._head[:, part.pages], torch.stack(tables))
        self._replay()
        num_rows, num_tokens = ids.shape
        return type(self._output)(
            **{
                name: part[:num_rows] if part.ndim == 2 else part[:num_rows, :num_tokens]
                for name, part in _tensors(self._output).items()
            }
        )


def _fill(fixed: torch.Tensor, given: torch.Tensor, pad: int = 0) -> None:
    """Write a [rows, n] tensor into a larger one, its rows filled up and its last row repeated."""
    num_rows, width = given.shape
    fixed[:num_rows, :width] = given
    fixed[:num_rows, width:] = pad
    fixed[num_rows:] = fixed[num_rows - 1]


def _tensors(output: ModelOutput) -> dict[str, torch.Tensor]:
    return {name: part for name, part in output.items() if torch.is_tensor(part)}


def on_cuda(device: torch.device) -> Record:
    """Return what records CUDA graphs, all in one pool of memory: they never run side by side."""
    pool: Any = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)

    def record(work: Work) -> tuple[Callable[[], None], ModelOutput]:
        here = torch.cuda.current_stream(device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            for _ in range(2):  # what libraries do once may not be recorded
                work()
            graph = torch.cuda.CUDAGraph()
            # Other threads pin memory for adapters meanwhile, which "global" forbids.
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                output = work()
        here.wait_stream(stream)
        return graph.replay, output

    return record
