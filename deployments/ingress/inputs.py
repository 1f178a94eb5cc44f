"""What a request says, checked against its task's rules and turned into tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from deployments.errors import BadInput
from deployments.ingress.wire import Pair, PredictRequest
from deployments.rows import Facts
from deployments.tokens import Encoded, Input, Tokenizer

_SURROGATE = re.compile("[\ud800-\udfff]")


class Given(NamedTuple):
    """One input of a request.

    Attributes:
        text: As the tokenizer can read it, as long as the caller's.
        num_replaced: Its lone surrogates, halves of a UTF-16 pair, each of which U+FFFD replaced:
            they are no characters, and no UTF-8 can hold them.
    """

    text: Input
    num_replaced: int


def to_inputs(facts: Facts, request: PredictRequest) -> list[Given]:
    """Check every input against the task's rules.

    Raises:
        BadInput: One of them, or the request's threshold, does not fit the task.
    """
    if request.threshold is not None and facts["problem_type"] == "regression":
        raise BadInput(f"task {facts['task']!r} is a regression and takes no threshold")
    inputs: list[Given] = []
    for index, given in enumerate(request.inputs):
        if facts["pair"] != isinstance(given, Pair):
            form = '{"text": …, "text_pair": …}' if facts["pair"] else "a string"
            raise BadInput(f"texts[{index}] must be {form} for task {facts['task']!r}")
        if isinstance(given, Pair):
            text, replaced = _SURROGATE.subn("\ufffd", given.text)
            text_pair, also_replaced = _SURROGATE.subn("\ufffd", given.text_pair)
            inputs.append(Given((text, text_pair), replaced + also_replaced))
        else:
            inputs.append(Given(*_SURROGATE.subn("\ufffd", given)))
    return inputs


def encode(
    tokenizer: Tokenizer, facts: Facts, inputs: Sequence[Given], max_rows: int
) -> list[list[Encoded] | str]:
    """Turn inputs into tokens.

    Args:
        tokenizer: The base's.
        facts: The task.
        inputs: The inputs.
        max_rows: Most windows of all inputs together.

    Returns:
        For each input its windows, one unless the rules ask for more, or a sentence if it cannot
        be read.

    Raises:
        BadInput: The windows are more than `max_rows`.
    """
    try:
        return [*_encode(tokenizer, facts, inputs, max_rows, max_rows)]
    except ValueError:
        pass
    # One of them cannot be cut; find out which, so that it fails alone.
    encoded: list[list[Encoded] | str] = []
    left = max_rows
    for given in inputs:
        try:
            (windows,) = _encode(tokenizer, facts, [given], left, max_rows)
        except ValueError as error:
            encoded.append(str(error))
        else:
            left -= len(windows)
            encoded.append(windows)
    return encoded


def _encode(
    tokenizer: Tokenizer, facts: Facts, inputs: Sequence[Given], left: int, max_rows: int
) -> list[list[Encoded] | str]:
    texts = [given.text for given in inputs]
    max_length, strategy = facts["max_length"], facts["truncation"]
    spans = facts["problem_type"] == "token_classification"
    if facts["stride"] is None or strategy is None:
        encoded = tokenizer.encode(texts, max_length, strategy, spans=spans)
        return [_refuse_long(one, max_length) for one in encoded]
    windows = tokenizer.windows(
        texts, max_length, facts["stride"], strategy, max_windows=left, spans=spans
    )
    if windows is None:
        raise BadInput(
            f"the texts make more than {max_rows} windows of {max_length} tokens, the limit of a "
            "request; send fewer or shorter texts"
        )
    return [*windows]


def _refuse_long(encoded: Encoded, max_length: int) -> list[Encoded] | str:
    if len(encoded.tokens.ids) > max_length:
        return (
            f"{encoded.num_tokens} tokens are over the task's max_length of {max_length}, "
            "and its rules do not allow to cut them"
        )
    return [encoded]
