"""How large the bank is: what the configuration says, and for `auto` what the store holds."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from adapters.store import Store
from deployments.base import BaseName
from deployments.config import GIB, MAX_LABELS, MAX_RANK, Args, ConfigError
from deployments.model.encoder import base_config, head_paths, is_target

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
    """

    adapter_slots: int
    max_lora_rank: int
    max_labels: int
    lora_targets: Collection[str] | None


@dataclass(frozen=True, slots=True)
class _Held:
    """The largest of everything that the store's adapters ask for."""

    rank: int
    labels: int
    targets: frozenset[str]


def choose_sizes(args: Args, base: BaseName, store: Store, dtype: torch.dtype) -> Sizes:
    """Return a bank's measures, `auto` being all linears, rank 16, 16 labels and 64 slots.

    It is more where the store's adapters need more, and less where that exceeds `max_bank_gib`:
    first fewer slots, then only what the store's adapters need, then without regard to them: one
    odd adapter, which is then refused when it is asked for, must not stop the start.

    Raises:
        ConfigError: `max_bank_gib` does not hold the slots asked for, or not one adapter.
        BaseUnavailable: The base cannot be had.
    """
    # On the meta device the model has shapes but no weights, so this costs no memory.
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(base_config(base))
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    head = head_paths(model, linears, missing=())
    held = _survey(store, head[-1], linears)
    wide = _merge(args, held, _Held(_RANK, _LABELS, frozenset()), targets=None)
    narrow = _merge(args, held, _Held(1, 1, frozenset()), targets=held.targets or None)
    plain = _merge(args, _Held(0, 0, frozenset()), _Held(_RANK, _LABELS, frozenset()), None)
    for measures, least in ((wide, _FEW), (narrow, 1), (plain, 1)):
        row_bytes = _row_bytes(linears, head, measures, dtype)
        fitting = int(args.max_bank_gib * GIB) // row_bytes - 1  # slot 0 is the zero adapter
        if fitting >= (least if args.adapter_slots == "auto" else args.adapter_slots):
            slots = min(_SLOTS, fitting) if args.adapter_slots == "auto" else args.adapter_slots
            return _sizes(slots, measures)
    raise ConfigError(
        f"an adapter takes {row_bytes / GIB:.2g} GiB of the bank, so max_bank_gib="
        f"{args.max_bank_gib} does not hold adapter_slots={args.adapter_slots}; raise it, or lower "
        "adapter_slots, max_lora_rank or lora_targets"
    )


_Measures = tuple[int, int, Collection[str] | None]


def _sizes(slots: int, measures: _Measures) -> Sizes:
    rank, labels, targets = measures
    return Sizes(slots, rank, labels, targets)


def _merge(args: Args, held: _Held, least: _Held, targets: Collection[str] | None) -> _Measures:
    """What is configured, else the larger of what is held and of `least`."""
    return (
        max(held.rank, least.rank) if args.max_lora_rank == "auto" else args.max_lora_rank,
        max(held.labels, least.labels) if args.max_labels == "auto" else args.max_labels,
        targets if args.lora_targets == "auto" else args.lora_targets,
    )


def _survey(store: Store, labelled: str, linears: Collection[str]) -> _Held:
    """Look over the store's configs and tensor headers.

    What cannot be read, or cannot be meant, counts as nothing: one odd folder, which is refused
    when it is asked for, must not keep the base from being served.
    """
    rank, labels, targets = 0, 0, set[str]()
    for task in store.tasks():
        config, shapes = store.summary(task, [f"{labelled}.weight"])
        r, names = config.get("r"), config.get("target_modules")
        rank = max(rank, _measure(r, MAX_RANK))
        if isinstance(names, str):  # "all-linear", or a regular expression
            targets.update(linears)
        names = names if isinstance(names, list) else []
        targets.update(name for name in names if isinstance(name, str))
        heads = [s for s in shapes.values() if isinstance(s, list) and len(s) == 2]
        labels = max([labels, *(_measure(rows, MAX_LABELS) for rows, _ in heads)])
    return _Held(rank, labels, frozenset(targets))


def _measure(value: object, largest: int) -> int:
    return value if isinstance(value, int) and 0 < value <= largest else 0


def _row_bytes(
    linears: dict[str, nn.Linear], head: list[str], measures: _Measures, dtype: torch.dtype
) -> int:
    rank, labels, targets = measures
    total = 0
    for path, linear in linears.items():
        if path == head[-1]:
            total += 4 * labels * (linear.in_features + 1)
        elif path in head:
            total += 4 * linear.out_features * (linear.in_features + 1)
        elif is_target(path, targets):
            total += dtype.itemsize * rank * (linear.in_features + linear.out_features)
    return total
