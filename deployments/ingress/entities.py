"""Classified tokens to entities, as transformers' `TokenClassificationPipeline` defines them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from adapters.rules import Aggregation, entity_label
from deployments.ingress.windows import Piece

_OUTSIDE = "O"  # what the pipeline ignores unless told otherwise


class Entity(NamedTuple):
    """A part of a text with its label.

    Attributes:
        label: A label; of a group of tokens without its `B-` or `I-`.
        score: The label's probability; of a group the mean of its tokens', or of its words'.
        start: Of its first character, a code point of the text.
        end: After its last one.
    """

    label: str
    score: float
    start: int
    end: int


def find_entities(
    pieces: Sequence[Piece], labels: Sequence[str], aggregation: Aggregation
) -> list[Entity]:
    """Find the entities in a text.

    Args:
        pieces: The text's tokens, special tokens not among them.
        labels: By index.
        aggregation: `none` gives each token that has a label; `simple` joins neighbours of one
            label, but for those that begin with `B-`; `first` and `max` do so with words, which
            have the label of their first, or their surest, token.

    Returns:
        Entities in their order, without those labelled `O`.
    """
    if aggregation in ("none", "simple"):
        tagged = [_tag([piece], labels, _first) for piece in pieces]
    else:
        choose = _first if aggregation == "first" else _surest
        tagged = [_tag(word, labels, choose) for word in _words(pieces)]
    if aggregation != "none":
        tagged = [_join(group) for group in _groups(tagged)]
    return [entity for entity in tagged if entity.label != _OUTSIDE]


def _first(word: Sequence[Piece]) -> Piece:
    return word[0]


def _surest(word: Sequence[Piece]) -> Piece:
    return max(word, key=lambda piece: max(piece.scores))


def _tag(
    word: Sequence[Piece], labels: Sequence[str], choose: Callable[[Sequence[Piece]], Piece]
) -> Entity:
    """Label a word by one of its tokens."""
    scores = choose(word).scores
    score = max(scores)
    return Entity(labels[scores.index(score)], score, word[0].span.start, word[-1].span.end)


def _words(pieces: Iterable[Piece]) -> list[list[Piece]]:
    words: list[list[Piece]] = []
    for piece in pieces:
        if words and piece.span.subword:
            words[-1].append(piece)
        else:
            words.append([piece])
    return words


def _groups(entities: Iterable[Entity]) -> list[list[Entity]]:
    """Part entities where another one begins: at another tag, or at `B-`."""
    groups: list[list[Entity]] = []
    for entity in entities:
        if (
            groups
            and not entity.label.startswith("B-")
            and _tag_of(entity.label) == _tag_of(groups[-1][-1].label)
        ):
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return groups


def _tag_of(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label


def _join(group: Sequence[Entity]) -> Entity:
    score = sum(entity.score for entity in group) / len(group)
    return Entity(entity_label(group[0].label), score, group[0].start, group[-1].end)
