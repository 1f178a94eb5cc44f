"""What came into a replica's slots and left them, for ingresses that place rows by it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from deployments.rows import Residency

# Changes that are remembered; who has missed more is told all that is here.
_REMEMBERED = 4096


class News:
    """Changes of one replica's residents, numbered. Owned by one event loop."""

    def __init__(self) -> None:
        """Start with nobody resident."""
        self._last = 0
        self._changes: deque[tuple[str, bool]] = deque(maxlen=_REMEMBERED)
        self._names: dict[int, str] = {}  # by slot
        self._crowded = False

    def came(self, slot: int, name: str, gone: Sequence[int]) -> None:
        """Note that a version has come to a slot, after those that left for it."""
        self._crowded |= bool(gone)
        self.left(gone)
        self._names[slot] = name
        self._note(name, True)

    def left(self, slots: Sequence[int]) -> None:
        """Note that slots are empty."""
        for slot in slots:
            name = self._names.pop(slot, None)
            if name is not None:
                self._note(name, False)

    def since(self, number: int) -> Residency | None:
        """Return what has changed after a number, None if nothing has.

        Args:
            number: Of the last that the asker has heard of; 0 for one who knows nothing.
        """
        missed = self._last - number
        if not missed:
            return None
        whole = not number or not 0 < missed <= len(self._changes)
        held: dict[str, bool] = dict.fromkeys(self._names.values(), True)
        if not whole:
            held = dict(list(self._changes)[-missed:])
        return {"number": self._last, "whole": whole, "held": held, "crowded": self._crowded}

    def _note(self, name: str, is_here: bool) -> None:
        self._last += 1
        self._changes.append((name, is_here))
