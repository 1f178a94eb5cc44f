"""Forwards that do not fit into memory."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DoesNotFit(MemoryError):
    """Rows whose forward takes more memory than there is; what it took is free again."""


@contextmanager
def fitting(num_tokens: int) -> Iterator[None]:
    """Run a forward without gradients; if it does not fit, free what it took, and raise."""
    try:
        with torch.inference_mode():
            yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        # The traceback would keep every layer's tensors while the halves of the batch run.
        traceback.clear_frames(error.__traceback__)
        torch.cuda.empty_cache()
        what = f"a forward of {num_tokens} tokens does not fit into memory: {error}"
        raise DoesNotFit(what) from None


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Tell; of a CPU torch says it in words only."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error)
