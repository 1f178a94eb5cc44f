"""Regular expressions that an adapter brings: matched as PEFT does, but never for long. No torch.

`re` cannot be stopped and holds the interpreter: one pattern of nested repeats would end every
task on the replica. `regex` takes the same patterns, a time limit, and lets other threads run.
"""

from __future__ import annotations

import math
import re

import regex

_MAX_CHARACTERS = 10_000
# `regex` writes counted repeats out when it compiles: `((a{999}){999}){999}` takes all memory.
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
_MAX_REPEATS = 100
_PATIENCE_S = 0.5


class PatternTooSlow(ValueError):
    """A pattern did not come to an end; the message names it."""


def pattern_problem(pattern: str) -> str | None:
    """Return what is wrong with a pattern, to be read after its key's name, or None."""
    if len(pattern) > _MAX_CHARACTERS:
        return f"has {len(pattern)} characters, over the limit of {_MAX_CHARACTERS}"
    counts = (int(count[:9] or 1) or 1 for found in _COUNT.findall(pattern) for count in found)
    if math.prod(counts) > _MAX_REPEATS:
        return f"repeats a part more than {_MAX_REPEATS} times"
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        return f"is not a valid regular expression ({error})"
    return None


def fullmatch(pattern: str, path: str) -> bool:
    """Tell whether a pattern matches a whole module path, as `re.fullmatch` would.

    Raises:
        PatternTooSlow: It takes longer than any that is meant so.
    """
    return match(rf"(?:{pattern})\Z", path) is not None


def match(pattern: str, path: str) -> regex.Match[str] | None:
    """Match a pattern at the start of a module path, as `re.match` would.

    Raises:
        PatternTooSlow: It takes longer than any that is meant so.
    """
    try:
        return regex.match(pattern, path, timeout=_PATIENCE_S, concurrent=True)
    except TimeoutError:
        raise PatternTooSlow(
            f"the pattern {pattern[:60]!r} does not come to an end; "
            "name the modules, or nest no repeats in it"
        ) from None
