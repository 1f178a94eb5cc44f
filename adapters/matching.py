"""Which modules of a base a PEFT config means, by PEFT's own rules. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as shorten
from typing import Any

from adapters.pattern import fullmatch, match, pattern_problem

MAX_NAMES = 10_000
_FIRST_INDEX = r".*?\.[^.]*\.(?P<index>\d+)\."


@dataclass(frozen=True, slots=True)
class Matching:
    """The keys of `adapter_config.json` that select modules.

    Attributes:
        target_modules: Ends of module paths, or one regular expression.
        exclude_modules: Likewise, for modules left out; empty for none.
        modules_to_save: Ends of the paths of modules that are trained whole.
        layers_to_transform: Indices of the layers that are targeted; None for all.
        layers_pattern: Names of the lists that these indices count in; empty for any.
        feedforward_modules: Modules whose input, not output, IA3 scales.
    """

    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str = ()
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    feedforward_modules: tuple[str, ...] | str = ()

    def targets(self, path: str) -> bool:
        """Tell whether PEFT would adapt this module (`check_target_module_exists`)."""
        if _matches(path, self.exclude_modules):
            return False
        if any(_is_below(path, name) for name in self.modules_to_save):
            return False
        if not _matches(path, self.target_modules):
            return False
        named = not isinstance(self.target_modules, str) and path not in self.target_modules
        return not named or self.layers_to_transform is None or self._in_layers(path)

    def _in_layers(self, path: str) -> bool:
        patterns = [rf"(?:^|.*?\.){name}\.(?P<index>\d+)\." for name in self.layers_pattern]
        for pattern in patterns or [_FIRST_INDEX]:
            found = match(pattern, path)
            if found is not None:
                return int(found["index"]) in (self.layers_to_transform or ())
        return False

    def saves(self, path: str) -> bool:
        """Tell whether this module, or one that it is part of, is trained whole.

        PEFT compares ends of paths (`classifier` is also the end of `pre_classifier`).
        """
        parts = path.split(".")
        above = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        return any(module.endswith(name) for module in above for name in self.modules_to_save)

    def feeds_forward(self, path: str) -> bool:
        """Tell whether IA3 scales this target's input (`_check_target_module_feedforward`)."""
        if isinstance(self.feedforward_modules, str):
            return fullmatch(self.feedforward_modules, path)
        return any(path.endswith(name) for name in self.feedforward_modules)


def _is_below(path: str, name: str) -> bool:
    """Tell whether a module is, or is part of, one to save; the name is a pattern too."""
    if name.isidentifier():  # as nearly all are, and spared most of a load's time
        return name in path.split(".")
    return match(rf"(^|.*\.){name}($|\..*)", path) is not None


def _matches(path: str, patterns: tuple[str, ...] | str) -> bool:
    if patterns == "all-linear":
        return True
    if isinstance(patterns, str):
        return fullmatch(patterns, path)
    return any(path == name or path.endswith("." + name) for name in patterns)


def pattern_value(patterns: Mapping[str, float], path: str, default: float) -> float:
    """Return `rank_pattern`'s or `alpha_pattern`'s value for a module (`get_pattern_key`)."""
    for pattern, value in patterns.items():
        if match(rf"(.*\.)?({pattern})$", path):
            return value
    return patterns.get(path, default)


def read_matching(config: Mapping[str, Any], problems: list[str]) -> Matching:
    """Read the keys of `adapter_config.json` that select modules; tell problems."""
    targets = _names("target_modules", config.get("target_modules"), problems)
    if not targets:
        problems.append("target_modules names nothing")
    saved, layers = config.get("modules_to_save"), config.get("layers_to_transform")
    lists = config.get("layers_pattern")
    indices = [layers] if isinstance(layers, int) else layers or []
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        problems.append(f"layers_to_transform must be a list of indices, not {shorten(layers)}")
        indices = []
    return Matching(
        target_modules=targets,
        exclude_modules=_names("exclude_modules", config.get("exclude_modules"), problems),
        feedforward_modules=_names(
            "feedforward_modules", config.get("feedforward_modules"), problems
        ),
        modules_to_save=_patterns("modules_to_save", saved, problems),
        layers_pattern=_patterns("layers_pattern", lists, problems),
        layers_to_transform=tuple(indices) or None,
    )


def _names(key: str, value: Any, problems: list[str]) -> tuple[str, ...] | str:
    """Return a list of names, or one regular expression, as PEFT takes them."""
    if value is None:
        return ()
    if isinstance(value, str):
        check_pattern(key, value, problems)
        return value
    if isinstance(value, list) and len(value) > MAX_NAMES:
        problems.append(f"{key} has {len(value)} names, over the limit of {MAX_NAMES}")
        return ()
    if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    problems.append(f"{key} must be a list of names, not {shorten(value)}")
    return ()


def _patterns(key: str, value: Any, problems: list[str]) -> tuple[str, ...]:
    """Return a list of names, or a single one, which PEFT also reads as patterns."""
    names = _names(key, value, problems)
    names = (names,) if isinstance(names, str) else names
    for name in names:
        check_pattern(key, name, problems)
    return names


def check_pattern(key: str, pattern: str, problems: list[str]) -> None:
    """Tell a problem if a pattern is no regular expression, or one without an end."""
    problem = pattern_problem(pattern)
    if problem:
        problems.append(f"{key} {problem}")
