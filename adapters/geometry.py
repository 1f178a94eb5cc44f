"""What a base offers to adapters: its sites and its heads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from adapters.tokenizer import BaseTokenizer

TaskType = Literal["SEQ_CLS", "TOKEN_CLS"]


@dataclass(frozen=True, slots=True)
class SiteShape:
    """One module of the base that reads the bank.

    Attributes:
        kind: `linear` for one that may get LoRA, vectors and a bias; `embedding` likewise for
            LoRA; `shift` for any other with a bias.
        in_features: Width of its input; of an embedding, the number of its entries.
        out_features: Width of its output.
        bias: Whether the module has a bias.
        whole: Its parameters' shapes if an adapter may bring it whole, else empty.
    """

    kind: Literal["linear", "embedding", "shift"]
    in_features: int
    out_features: int
    bias: bool
    whole: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HeadShape:
    """One module of a head, which an adapter replaces whole.

    Attributes:
        parameters: `weight` and, where there is one, `bias` -> shape in the base's own head.
        labelled: Whether its output is the logits, so that an adapter may bring other rows.
        in_base: Whether the base's checkpoint brings it, for adapters that do not.
    """

    parameters: Mapping[str, tuple[int, ...]]
    labelled: bool = False
    in_base: bool = False


@dataclass(frozen=True, slots=True)
class Graph:
    """How one task type is answered: one transformers class over the shared encoder.

    Attributes:
        architecture: The class, `BertForSequenceClassification`.
        heads: Module path -> shape of every module of its head.
        absent: Linears of the encoder that this class does not have (BERT's pooler, for tokens).
    """

    architecture: str
    heads: Mapping[str, HeadShape]
    absent: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sites of a base by module path, and its heads.

    Attributes:
        base_id: The hub id that the server names, or None for a local folder.
        sites: Module path -> shape.
        graphs: Task type -> how it is answered.
        linears: Every linear of the encoder.
        embeddings: Every embedding of the encoder that may be targeted.
        max_positions: Longest input in tokens, None where positions have no end.
        base_aliases: Other hub ids of the same base.
        tokenizer: The base's, None where it has none and adapters' are not compared.
    """

    base_id: str | None
    sites: Mapping[str, SiteShape]
    graphs: Mapping[TaskType, Graph]
    linears: frozenset[str]
    max_positions: int | None
    embeddings: frozenset[str] = frozenset()
    base_aliases: frozenset[str] = frozenset()
    tokenizer: BaseTokenizer | None = None


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_id(name: str | None) -> str | None:
    """Return `org/name` without its revision if name has that form, else None (a local path)."""
    if name is None:
        return None
    stem = name.split("@", 1)[0]
    return stem if HUB_ID.fullmatch(stem) else None
