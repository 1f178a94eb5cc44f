"""The bank: one tensor of pages that all resident adapters live in, each in as many as it fills."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from deployments.config import GIB, ConfigError
from deployments.model.copies import Copies
from deployments.model.packing import Own, Packed, Packing, Part, Tensors
from deployments.model.pages import Pages, page_bytes, pages_of


@dataclass(slots=True)
class Seat:
    """A resident adapter: its pages by number, int64 on the device, those of its head apart.

    Attributes:
        own: What it brings for the encoder, views of its pages; None before that was asked for.
    """

    packing: Packing
    heads: Mapping[str, Part]
    pieces: Sequence[range]
    body: torch.Tensor
    head: torch.Tensor
    own: Own | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of a batch that lie together and whose adapters are packed alike.

    Attributes:
        rows: Which rows.
        sites: As `Packing.sites`.
        table: [rows, pages], int64: the pages of each row's adapter. [1, pages] if it is the same
            for all of them.
        start: The first page of that one adapter if it lies in one piece, else None.
    """

    rows: slice
    sites: Mapping[str, Mapping[str, Part]]
    table: torch.Tensor
    start: int | None


class Bank:
    """`[pages, page_bytes]`: loading an adapter is a copy or a few, forgetting it none at all.

    Page 0 is zero, which adds nothing to a product. Slots are names for residents, from 1 on; slot
    0 changes nothing, and its rows go through the plain base. Used by one thread at a time, but for
    `pack`.
    """

    def __init__(
        self, num_bytes: int, dtype: torch.dtype, width: int, device: torch.device
    ) -> None:
        """Allocate the pages; on a CPU memory is taken as they are written.

        Args:
            num_bytes: Of all pages.
            dtype: Of what the encoder's sites read; heads are fp32.
            width: Elements of a typical vector, see `page_bytes`.
            device: Where the pages are.
        """
        self.dtype = dtype
        self.page_bytes = page_bytes(width, dtype.itemsize)
        self.num_pages = num_bytes // self.page_bytes
        try:
            self.memory = torch.empty(
                1 + self.num_pages, self.page_bytes, dtype=torch.uint8, device=device
            )
        except RuntimeError:  # torch.OutOfMemoryError is one
            raise ConfigError(
                f"bank_gib={num_bytes / GIB:g} is more memory than there is on {device}; lower it"
            ) from None
        self.memory[0] = 0
        self._copies = Copies(device)
        self._body = self.memory.view(dtype)
        self._heads = self.memory.view(torch.float32)
        self._free = Pages(1, 1 + self.num_pages)
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        self._seats = {0: Seat(Packing({}, 0), {}, (), nothing, nothing)}
        self._packings: WeakValueDictionary[tuple[object, ...], Packing] = WeakValueDictionary()
        self._packings_lock = threading.Lock()
        self.runs: list[Run] = []
        self.rows: list[Seat] = []

    def pack(self, body: Mapping[str, Tensors], heads: Tensors) -> Packed:
        """Lay an adapter's tensors out in pages.

        Args:
            body: Module path -> what its site reads -> fp32 CPU tensor.
            heads: Head module -> fp32 CPU tensor.
        """
        sites: dict[str, dict[str, Part]] = {}
        num_pages = 0
        for path, tensors in body.items():
            sites[path] = {}
            for name, tensor in tensors.items():
                part = self._part(tensor, self.dtype, num_pages)
                sites[path][name], num_pages = part, part.pages.stop
        parts: dict[str, Part] = {}
        num_of_heads = 0
        for name, tensor in heads.items():
            parts[name] = self._part(tensor, torch.float32, num_of_heads)
            num_of_heads = parts[name].pages.stop
        pages = torch.zeros(
            num_pages + num_of_heads,
            self.page_bytes,
            dtype=torch.uint8,
            # From pinned memory a slot is written without a copy in between, and without waiting.
            pin_memory=self.memory.is_cuda,
        )
        for path, tensors in body.items():
            for name, tensor in tensors.items():
                _write(pages[sites[path][name].pages].view(self.dtype), tensor)
        for name, tensor in heads.items():
            _write(pages[num_pages:][parts[name].pages].view(torch.float32), tensor)
        key = tuple((path, *((n, t.shape) for n, t in of.items())) for path, of in body.items())
        with self._packings_lock:  # loads run in several threads
            packing = self._packings.setdefault(key, Packing(sites, num_pages))
        return Packed(pages, packing, parts)

    def _part(self, tensor: torch.Tensor, dtype: torch.dtype, first: int) -> Part:
        stop = first + pages_of(tensor.numel() * dtype.itemsize, self.page_bytes)
        return Part(slice(first, stop), tuple(tensor.shape))

    def write(self, slot: int, packed: Packed) -> None:
        """Copy an adapter into free pages, after letting go of what the slot had.

        Raises:
            MemoryError: Too few pages are free.
        """
        if slot < 1:
            raise ValueError(f"slot {slot} is not 1 or more")
        self.forget(slot)
        pieces = self._free.take(len(packed.pages))
        done = 0
        with self._copies.of(slot):
            for piece in pieces:
                source = packed.pages[done : done + len(piece)]
                self.memory[piece.start : piece.stop].copy_(source, non_blocking=True)
                done += len(piece)
        device = self.memory.device
        numbers = torch.cat([torch.arange(p.start, p.stop, device=device) for p in pieces])
        body, head = numbers.tensor_split([packed.packing.num_pages])
        self._seats[slot] = Seat(packed.packing, packed.heads, pieces, body, head)

    def forget(self, slot: int) -> None:
        """Free a slot's pages; there need not be any."""
        seat = self._seats.pop(slot, None)
        if seat is not None:
            self._free.give(seat.pieces)

    def likeness(self, slot: int) -> tuple[int, int]:
        """Return what to sort rows by, so that those packed alike lie together."""
        return id(self._seats[slot].packing), slot

    def route(self, slots: Sequence[int]) -> None:
        """Set what every site reads in the next forward: a slot for each row."""
        self._copies.wait(slots)
        self.rows = [self._seats[slot] for slot in slots]
        self.runs, start = [], 0
        for _, group in itertools.groupby(self.rows, key=lambda seat: id(seat.packing)):
            seats = list(group)
            rows = slice(start, start + len(seats))
            self.runs.append(_run(rows, seats))
            start = rows.stop

    def own(self) -> list[Own]:
        """Return what each row's adapter changes, in the compute dtype; not to be kept."""
        seats = {id(seat): seat for seat in self.rows}
        own = {key: seat.own or self._own(seat) for key, seat in seats.items()}
        return [own[id(seat)] for seat in self.rows]

    def _own(self, seat: Seat) -> Own:
        in_one = len(seat.pieces) == 1
        if in_one:
            start = seat.pieces[0].start
            pages = self._body[start : start + seat.packing.num_pages]
        else:
            pages = functional.embedding(seat.body, self._body)
        own = {
            path: {
                name: pages[part.pages].view(-1)[: math.prod(part.shape)].view(part.shape)
                for name, part in parts.items()
            }
            for path, parts in seat.packing.sites.items()
        }
        if in_one:  # else it would be a second copy
            seat.own = own
        return own

    def gather(self, run: Run, part: Part) -> torch.Tensor:
        """Return each row's own tensor, [rows of the run, *shape], in the compute dtype.

        Rows of one slot share it, expanded instead of copied. A product with either gives the same
        bits, so an answer does not depend on whether its neighbours use the same adapter.
        """
        if run.start is None:
            pages = functional.embedding(run.table[:, part.pages], self._body)
        else:
            first, stop = run.start + part.pages.start, run.start + part.pages.stop
            pages = self._body[first:stop].unsqueeze(0)
        tensors = _shaped(pages, part.shape)
        num_rows = run.rows.stop - run.rows.start
        return tensors if len(tensors) == num_rows else tensors.expand(num_rows, *part.shape)

    def entries(self, run: Run, part: Part, indices: torch.Tensor) -> torch.Tensor:
        """Return rows of each batch row's own matrix.

        Args:
            run: Rows of the batch.
            part: A matrix, [entries, size].
            indices: [rows of the run, tokens], int64, which entries.

        Returns:
            [rows of the run, tokens, size], in the compute dtype.
        """
        size, width = part.shape[1], self._body.shape[1]
        at = indices.unsqueeze(2) * size + torch.arange(size, device=indices.device)
        table = run.table[:, part.pages].expand(len(indices), -1)
        pages = table.gather(1, (at // width).flatten(1)).view_as(at)
        return self._body.view(-1)[pages * width + at % width]

    def gather_head(self, name: str) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Go through the rows' own tensors of a head module, those of like size together.

        Yields:
            Indices of rows, and [those rows, most of the first axis, …], fp32. Where a row's has
            fewer (labels), the rest is zero.
        """
        sizes: dict[int, list[int]] = {}
        for index, seat in enumerate(self.rows):
            part = seat.heads.get(name)
            if part is not None:
                # Up to twice the size: a row of two labels must not pay for one of a thousand.
                sizes.setdefault(max(4, part.shape[0] - 1).bit_length(), []).append(index)
        for indices in sizes.values():
            yield indices, self._gather_head(name, [self.rows[index] for index in indices])

    def _gather_head(self, name: str, seats: Sequence[Seat]) -> torch.Tensor:
        parts = [seat.heads[name] for seat in seats]
        shape = (max(part.shape[0] for part in parts), *parts[0].shape[1:])
        if all(seat is seats[0] for seat in seats):
            table = seats[0].head[parts[0].pages].unsqueeze(0)
        else:
            tables = [seat.head[part.pages] for seat, part in zip(seats, parts, strict=True)]
            table = pad_sequence(tables, batch_first=True)  # with page 0
        tensors = _shaped(functional.embedding(table, self._heads), shape)
        return tensors.expand(len(parts), *shape)


def _run(rows: slice, seats: Sequence[Seat]) -> Run:
    first, sites = seats[0], seats[0].packing.sites
    if any(seat is not first for seat in seats):
        return Run(rows, sites, torch.stack([seat.body for seat in seats]), None)
    start = first.pieces[0].start if len(first.pieces) == 1 else None
    return Run(rows, sites, first.body.unsqueeze(0), start)


def _shaped(pages: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """View [rows, pages, elements of a page] as [rows, *shape]."""
    return pages.flatten(1)[:, : math.prod(shape)].view(len(pages), *shape)


def _write(pages: torch.Tensor, tensor: torch.Tensor) -> None:
    pages.view(-1)[: tensor.numel()] = tensor.flatten()
