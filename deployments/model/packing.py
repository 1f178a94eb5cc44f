"""Where the tensors of an adapter lie in its pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

Tensors = Mapping[str, torch.Tensor]
Own = Mapping[str, Tensors]  # module path -> what its site reads -> tensor


@dataclass(frozen=True, slots=True)
class Part:
    """Where one tensor of an adapter lies.

    Attributes:
        pages: Which of the adapter's pages; what is left of the last one is zero.
        shape: The tensor's.
    """

    pages: slice
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Packing:
    """Where everything lies that an adapter brings for the encoder.

    Adapters of the same ranks and targets share one object, so rows of them share a product where
    batches are padded.

    Attributes:
        sites: Module path -> what its site reads -> where it lies.
        num_pages: Pages of all of it, the first ones of an adapter.
    """

    sites: Mapping[str, Mapping[str, Part]]
    num_pages: int


@dataclass(frozen=True, slots=True)
class Packed:
    """An adapter as its pages.

    Attributes:
        pages: [pages, page_bytes], uint8, CPU.
        packing: Where what it brings for the encoder lies.
        heads: Head module -> where that lies; its pages are counted from 0 anew.
    """

    pages: torch.Tensor
    packing: Packing
    heads: Mapping[str, Part]
