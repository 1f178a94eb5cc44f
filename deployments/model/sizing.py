"""How large the bank is: what the configuration says, and for `auto` what the store holds."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch

from adapters.matching import Matching
from adapters.pattern import PatternTooSlow, fullmatch, pattern_problem
from adapters.sorter import PREFIX
from adapters.store import Store
from deployments.base import BaseName
from deployments.config import GIB, MAX_LABELS, MAX_RANK, Args, ConfigError
from deployments.model.bank import row_bytes
from deployments.model.checkpoint import Checkpoint
from deployments.model.layout import Layout, find_layout

_SLOTS, _RANK, _LABELS = 64, 16, 16  # what `auto` aims at, so that an empty store works
_FEW = 8  # slots under which it gives up generous rows for more of them


@dataclass(frozen=True, slots=True)
class Sizes:
    """A bank's measures.

    Attributes:
        adapter_slots: Adapters resident at a time.
        max_lora_rank: Largest rank.
        max_labels: Most labels.
        lora_targets: Ends of module paths with a LoRA site, None for all linears.
        saved_modules: Paths of the encoder's modules that adapters bring whole.
    """

    adapter_slots: int
    max_lora_rank: int
    max_labels: int
    lora_targets: Collection[str] | None
    saved_modules: Collection[str] = frozenset()


@dataclass(frozen=True, slots=True)
class _Held:
    """The largest of everything that the store's adapters ask for."""

    rank: int = 0
    labels: int = 0
    targets: frozenset[str] = frozenset()
    saved: frozenset[str] = frozenset()


def choose_sizes(args: Args, base: BaseName, store: Store, dtype: torch.dtype) -> Sizes:
    """Return a bank's measures, `auto` being all linears, rank 16, 16 labels and 64 slots.

    It is more where the store's adapters need more, and less where that exceeds `max_bank_gib`:
    first fewer slots, then only what the store's adapters need, then without regard to them: one
    odd adapter, which is then refused when it is asked for, must not stop the start.

    Raises:
        ConfigError: `max_bank_gib` does not hold the slots asked for, or not one adapter.
        BaseUnavailable: The base cannot be had.
    """
    checkpoint = Checkpoint.on_meta(base)
    plain = find_layout(checkpoint, None, ())
    held = _survey(store, plain)
    # Where an embedding is targeted, "all linears" has to be spelt.
    named = held.targets & plain.embeddings
    every = named | plain.linears if named else None
    wide = _merge(args, held, _Held(_RANK, _LABELS), targets=every)
    narrow = _merge(args, held, _Held(1, 1), targets=held.targets or None)
    none = _merge(args, _Held(), _Held(_RANK, _LABELS), targets=None)
    for sizes, least in ((wide, _FEW), (narrow, 1), (none, 1)):
        layout = find_layout(checkpoint, sizes.lora_targets, sizes.saved_modules)
        taken = row_bytes(layout.fields(dtype, sizes.max_lora_rank, sizes.max_labels))
        fitting = int(args.max_bank_gib * GIB) // taken - 1  # slot 0 is the zero adapter
        if fitting >= (least if args.adapter_slots == "auto" else args.adapter_slots):
            slots = min(_SLOTS, fitting) if args.adapter_slots == "auto" else args.adapter_slots
            return replace(sizes, adapter_slots=slots)
    raise ConfigError(
        f"an adapter takes {taken / GIB:.2g} GiB of the bank, so max_bank_gib="
        f"{args.max_bank_gib} does not hold adapter_slots={args.adapter_slots}; raise it, or lower "
        "adapter_slots, max_lora_rank or lora_targets"
    )


def _merge(args: Args, held: _Held, least: _Held, targets: Collection[str] | None) -> Sizes:
    """What is configured, else the larger of what is held and of `least`; slots come later."""
    return Sizes(
        0,
        max(held.rank, least.rank) if args.max_lora_rank == "auto" else args.max_lora_rank,
        max(held.labels, least.labels) if args.max_labels == "auto" else args.max_labels,
        targets if args.lora_targets == "auto" else args.lora_targets,
        held.saved if args.saved_modules == "auto" else args.saved_modules,
    )


def _survey(store: Store, layout: Layout) -> _Held:
    """Look over the store's configs and tensor headers.

    What cannot be read, or cannot be meant, counts as nothing: one odd folder, which is refused
    when it is asked for, must not keep the base from being served.
    """
    rank, labels, targets, saved = 0, 0, set[str](), set[str]()
    labelled = [
        f"{path}.weight"
        for graph in layout.graphs.values()
        for path, head in graph.heads.items()
        if head.labelled
    ]
    for task in store.tasks():
        config, shapes = store.summary(task, labelled + [f"{path}.weight" for path in layout.whole])
        patterns = config.get("rank_pattern")
        more = patterns.values() if isinstance(patterns, dict) else ()
        rank = max([rank, *(_measure(r, MAX_RANK) for r in (config.get("r"), *more))])
        names = config.get("target_modules")
        if isinstance(names, str):  # "all-linear", or a regular expression
            targets.update(layout.linears, filter(_matcher(names), layout.embeddings))
        else:
            targets.update(_names(names))
        whole = Matching((), modules_to_save=tuple(_names(config.get("modules_to_save"))))
        # Only what it has: a config that promises more is refused, and must cost nobody a thing.
        stored = {name.removeprefix(PREFIX).removesuffix(".weight") for name in shapes}
        saved.update(path for path in layout.whole & stored if whole.saves(path))
        heads = [
            shape
            for name, shape in shapes.items()
            if name.endswith(tuple(labelled)) and isinstance(shape, list) and len(shape) == 2
        ]
        labels = max([labels, *(_measure(rows, MAX_LABELS) for rows, _ in heads)])
    # An adapter names the embedding by its end.
    embeddings = {p for p in layout.embeddings if any(f".{p}".endswith(f".{t}") for t in targets)}
    return _Held(rank, labels, frozenset(targets | embeddings), frozenset(saved))


def _names(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [name for name in values if isinstance(name, str) and name]


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Return what tells whether a pattern of targets has a path; one that is no good has none."""

    def matches(path: str) -> bool:
        try:
            return pattern_problem(pattern) is None and fullmatch(pattern, path)
        except PatternTooSlow:
            return False

    return matches


def _measure(value: object, largest: int) -> int:
    return value if isinstance(value, int) and 0 < value <= largest else 0
