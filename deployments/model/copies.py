"""Copies to a GPU on a stream of their own, so that the forwards of other slots need not wait."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class Copies:
    """Which slots are being written, and what a forward that reads them waits for.

    On a CPU a copy has ended when it returns, and nothing here does anything. Used by one thread.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the stream, if the device has any."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._running: dict[int, torch.cuda.Event] = {}

    @contextmanager
    def of(self, slot: int) -> Iterator[None]:
        """Let the copies inside run beside what the device computes; they fill a slot."""
        if self._stream is None:
            yield
            return
        # A forward that was begun may still read what these pages held before.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
            self._running[slot] = self._stream.record_event()

    def wait(self, slots: Iterable[int]) -> None:
        """Let what the device computes from here on wait for the copies of slots."""
        for slot in self._running.keys() & set(slots) if self._running else ():
            torch.cuda.current_stream(self._device).wait_event(self._running.pop(slot))
