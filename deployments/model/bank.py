"""The bank: one tensor that all resident adapters live in, an adapter a row of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Field:
    """A site's part of a bank row.

    Attributes:
        name: `module.path.lora_A`, say; what `Artifact.tensors` calls it too.
        shape: Of one slot's tensor at the geometry's caps.
        dtype: LoRA in the compute dtype, heads in fp32.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes in a row."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Batch:
    """Which slot answers which row of the running forward, as every site reads it.

    Attributes:
        slots: [rows], int64, on the bank's device.
        only: The slot of all rows if they have but one, so that nothing is copied.
        fields: Bank fields that at least one row's adapter fills; a site of others does not run.
    """

    slots: torch.Tensor
    only: int | None
    fields: frozenset[str]


class Bank:
    """`[slots, row_bytes]`: loading an adapter is one row copy, forgetting it none at all.

    Slot 0 is the zero adapter, the plain base. Used by one thread at a time.
    """

    def __init__(self, fields: Iterable[Field], num_slots: int, device: torch.device) -> None:
        """Lay the fields out one after the other and allocate all slots, zeroed."""
        self._offsets: dict[str, tuple[Field, int]] = {}
        self.row_bytes = 0
        for field in fields:
            self._offsets[field.name] = (field, self.row_bytes)
            self.row_bytes += row_bytes([field])
        self.num_slots = num_slots
        self.memory = torch.zeros(num_slots, self.row_bytes, dtype=torch.uint8, device=device)
        self._filled: list[frozenset[str]] = [frozenset()] * num_slots
        self.batch = self.route([0])

    def view(self, name: str) -> torch.Tensor:
        """Return a field of all slots, [slots, *shape], strided into the bank."""
        return self._part(self.memory, name)

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return a row, [row_bytes] uint8 on the CPU, with tensors in the corner of their fields.

        A tensor smaller than its field (a lower rank, fewer labels) is padded with zeros, which
        add nothing to a product.
        """
        row = torch.zeros(1, self.row_bytes, dtype=torch.uint8)
        for name, tensor in tensors.items():
            corner = tuple(slice(size) for size in tensor.shape)
            self._part(row, name)[0][corner] = tensor
        return row[0]

    def write(self, slot: int, row: torch.Tensor, fields: Iterable[str]) -> None:
        """Copy a packed row into a slot; `fields` are those that it fills."""
        if not 0 < slot < self.num_slots:
            raise ValueError(f"slot {slot} is not one of 1…{self.num_slots - 1}")
        self.memory[slot].copy_(row)
        self._filled[slot] = frozenset(fields)

    def route(self, slots: Sequence[int]) -> Batch:
        """Set, and return, what every site reads in the next forward: a slot for each row."""
        distinct = set(slots)
        self.batch = Batch(
            slots=torch.tensor(slots, dtype=torch.int64, device=self.memory.device),
            only=next(iter(distinct)) if len(distinct) == 1 else None,
            fields=frozenset().union(*(self._filled[slot] for slot in distinct)),
        )
        return self.batch

    def gather(self, view: torch.Tensor) -> torch.Tensor:
        """Return a view's entry for each row of the batch, [rows, *shape].

        Rows of one slot share it, expanded instead of copied. A product with either gives the same
        bits, so an answer does not depend on whether its neighbours use the same adapter.
        """
        if self.batch.only is not None:
            return view[self.batch.only].expand(len(self.batch.slots), *view.shape[1:])
        return view[self.batch.slots]

    def _part(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        field, start = self._offsets[name]
        part = rows[:, start : start + field.num_bytes].view(field.dtype)
        # Strided, not reshaped: a view that became a copy would never see a write.
        return part.view(len(rows), *field.shape)


def row_bytes(fields: Iterable[Field]) -> int:
    """Return what fields take of a bank row, in bytes, each aligned."""
    return sum(-(-field.num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for field in fields)
