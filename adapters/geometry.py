"""What a base offers to adapters: its sites, and how large a bank row is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from adapters.tokenizer import BaseTokenizer


@dataclass(frozen=True, slots=True)
class SiteShape:
    """One linear of the base that reads the bank.

    Attributes:
        kind: `lora` for a linear that keeps its weight and adds x·A·B; `head` for a linear
            that an adapter replaces whole.
        in_features: Width of its input.
        out_features: Width of its output, of the widest head allowed for the last head linear.
        bias: Whether the linear has a bias.
        labelled: Whether its output is the logits, so that an adapter may bring fewer rows.
    """

    kind: Literal["lora", "head"]
    in_features: int
    out_features: int
    bias: bool
    labelled: bool = False


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sites of a base by module path, and the caps that all adapters share.

    Attributes:
        architecture: The transformers class, `BertForSequenceClassification`.
        base_id: The hub id that the server names, or None for a local folder.
        sites: Module path -> shape, LoRA and head sites alike.
        linears: Every linear of the base outside its head, site or not.
        max_rank: Largest LoRA rank that a slot can hold.
        max_labels: Largest number of labels that a slot can hold.
        max_positions: Longest input in tokens, None where positions have no end.
        base_aliases: Other hub ids of the same base.
        tokenizer: The base's, None where it has none and adapters' are not compared.
    """

    architecture: str
    base_id: str | None
    sites: Mapping[str, SiteShape]
    linears: frozenset[str]
    max_rank: int
    max_labels: int
    max_positions: int | None
    base_aliases: frozenset[str] = frozenset()
    tokenizer: BaseTokenizer | None = None


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_id(name: str | None) -> str | None:
    """Return `org/name` without its revision if name has that form, else None (a local path)."""
    if name is None:
        return None
    stem = name.split("@", 1)[0]
    return stem if HUB_ID.fullmatch(stem) else None
