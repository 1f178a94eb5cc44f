"""What some classes of transformers need said, because it cannot be found out: one line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from deployments.model.deberta import per_row_positions


@dataclass(frozen=True, slots=True)
class Words:
    """What is particular to a model type.

    Attributes:
        prepare: Changes the model before its sites are installed.
        rowless: Ends of the paths of modules whose input, [tokens, in], all rows share.
    """

    prepare: Callable[[PreTrainedModel], None] | None = None
    rowless: tuple[str, ...] = ()


_WORDS: Mapping[str, Words] = {
    "deberta-v2": Words(per_row_positions, rowless=("encoder.LayerNorm",)),
}


def words(model: PreTrainedModel) -> Words:
    """Return what is to be said of a model's type."""
    return _WORDS.get(model.config.model_type, Words())
