"""What a cell of the matrix must turn out to be; anything else fails the suite."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Right:
    """The engine answers as PEFT does."""


@dataclass(frozen=True)
class Refused:
    """The engine refuses the adapter, and one of its sentences has these words."""

    words: str


@dataclass(frozen=True)
class PeftCannot:
    """PEFT itself cannot make, save or load the adapter, and says so in these words."""

    words: str


Expectation = Right | Refused | PeftCannot
RIGHT = Right()
