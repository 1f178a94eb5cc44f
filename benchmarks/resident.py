"""What does a resident adapter take? Bytes of the bank on a mixed fleet, and time beside wide ones.

The fleet: LoRA of ranks 1 to 64 on query and value, on query, key and value, and on all linears;
DoRA; IA3; heads of 2 to 40 labels. An adapter's own bytes are those of its tensors as sites read
them, LoRA in the compute dtype and heads in fp32. Narrow beside wide: a batch of 32 rows of 32
tokens, each row with an adapter of its own (q,v r=8), where 8 wide adapters (all-linear r=64) lie
among them in the bank, and where none do, the latter twice to tell the noise. Packings: the same
batch of 8 adapters, of one rank and of eight ranks whose mean it is, in turns.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification

from adapters.artifact import read_artifact
from adapters.directory import Directory
from adapters.store import Files
from benchmarks.bars import bars
from benchmarks.bases import base_folder
from benchmarks.record import table
from benchmarks.timing import in_turns, ratio
from deployments.model.engine import Engine
from deployments.rows import Row, Tokens

BASES = ("MiniLM", "BERT-base")
RANKS = (1, 2, 4, 8, 16, 32, 64)
LABELS = (2, 3, 5, 8, 16, 24, 40)
MODULES: dict[str, Any] = {
    "q,v": ["query", "value"],
    "q,k,v": ["query", "key", "value"],
    "all-linear": "all-linear",
}
ROWS, TOKENS, WIDE = 32, 32, 8
ROUNDS = {"MiniLM": 11, "BERT-base": 5}
# As many ranks as adapters, and the one rank that is their mean.
SPREAD = {
    "q,v": ((4, 5, 6, 7, 9, 10, 11, 12), 8),
    "all-linear": ((12, 13, 14, 15, 17, 18, 19, 20), 16),
}


def measure() -> Iterator[dict[str, Any]]:
    """Bytes, narrow beside wide, and packings."""
    with tempfile.TemporaryDirectory() as folder:
        for base in BASES:
            model_folder = base_folder(base, Path(folder))
            yield from bytes_of(base, model_folder, Path(folder) / f"{base}-fleet")
        for base in BASES:
            model_folder = base_folder(base, Path(folder))
            for quantization in ("none", "int8"):
                store = Path(folder) / f"{base}-{quantization}"
                yield narrow_beside_wide(base, model_folder, store, quantization)
        model_folder = base_folder("MiniLM", Path(folder))
        for targets in SPREAD:
            for quantization in ("none", "int8"):
                store = Path(folder) / f"{targets}-{quantization}"
                yield packings(targets, model_folder, store, quantization)


def lora(targets: str, rank: int, **more: Any) -> LoraConfig:
    return LoraConfig(
        task_type=TaskType.SEQ_CLS, target_modules=MODULES[targets], r=rank, lora_alpha=rank, **more
    )


def fleet() -> Iterator[tuple[str, PeftConfig, int]]:
    """Name, PEFT's config and labels of every adapter."""
    for offset, targets in enumerate(MODULES):
        for index, rank in enumerate(RANKS):
            labels = LABELS[(index + 3 * offset) % len(LABELS)]
            yield f"{targets} r={rank}", lora(targets, rank), labels
    yield "DoRA q,v r=1", lora("q,v", 1, use_dora=True), 2
    yield "DoRA q,k,v r=8", lora("q,k,v", 8, use_dora=True), 5
    yield "DoRA all-linear r=16", lora("all-linear", 16, use_dora=True), 40
    for labels in (2, 40):
        ia3 = IA3Config(
            task_type=TaskType.SEQ_CLS,
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
        )
        yield f"IA3, {labels} labels", ia3, labels


def save_adapter(base: str, folder: Path, config: PeftConfig, labels: int) -> None:
    """Save a random adapter as PEFT does."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name or "ia3" in name:
                parameter.normal_(std=0.02)
    peft.save_pretrained(str(folder))


def own_bytes(engine: Engine, files: Files) -> int:
    """Size of an adapter's tensors in the bank's dtypes, laid out with no page between them."""
    delta = engine.encoder.deltas.of(read_artifact(files, engine.geometry, None))
    body = sum(t.numel() for named in delta.body.values() for t in named.values())
    heads = sum(t.numel() for t in delta.heads.values())
    return body * engine.encoder.bank.dtype.itemsize + heads * torch.float32.itemsize


def bytes_of(base: str, model_folder: str, folder: Path) -> Iterator[dict[str, Any]]:
    engine = Engine(model_folder, quantization="none", device="cpu")
    for index, (name, config, labels) in enumerate(fleet()):
        save_adapter(model_folder, folder / f"t{index}", config, labels)
        files = Directory(folder).read(f"t{index}")
        loaded, own = engine.read(files), own_bytes(engine, files)
        yield {
            "part": "bytes",
            "base": base,
            "adapter": name,
            "labels": labels,
            "bank_bytes": loaded.num_bytes,
            "own_bytes": own,
            "file_bytes": loaded.artifact.num_bytes,
            "by_own": loaded.num_bytes / own,
            "by_file": loaded.num_bytes / loaded.artifact.num_bytes,
        }


def rows_of(slots: Sequence[int]) -> list[Row]:
    """32 rows of random tokens, the slots in turn."""
    dice = torch.Generator().manual_seed(0)
    inputs = torch.randint(1000, 9000, (ROWS, TOKENS), generator=dice).tolist()
    return [Row(slots[i % len(slots)], Tokens(ids)) for i, ids in enumerate(inputs)]


def narrow_beside_wide(
    base: str, model_folder: str, folder: Path, quantization: str
) -> dict[str, Any]:
    save_adapter(model_folder, folder / "narrow", lora("q,v", 8), 2)
    save_adapter(model_folder, folder / "wide", lora("all-linear", 64), 2)
    store, sizes = Directory(folder), {}
    works, slots = {}, range(1, ROWS + 1)
    for name in ("without", "without, again", "with"):
        engine = Engine(model_folder, quantization=quantization, device="cpu")
        narrow, wide = (engine.read(store.read(task)) for task in ("narrow", "wide"))
        for slot in slots:
            engine.write(slot, narrow)
            if name == "with" and slot % (ROWS // WIDE) == 0:
                engine.write(ROWS + slot, wide)
        works[name] = partial(engine.predict, rows_of(slots))
        sizes = {"narrow": narrow.num_bytes, "wide": wide.num_bytes}
    taken = in_turns(works, ROUNDS[base])
    return {
        "part": "narrow",
        "base": base,
        "quantization": quantization,
        "bytes": sizes,
        "wide_resident": WIDE,
        "median_ms": {name: 1e3 * statistics.median(runs) for name, runs in taken.items()},
        "with_by_without": ratio(taken, "with", "without"),
        "again_by_without": ratio(taken, "without, again", "without"),
    }


def packings(targets: str, model_folder: str, folder: Path, quantization: str) -> dict[str, Any]:
    engine = Engine(model_folder, quantization=quantization, device="cpu")
    spread, mean = SPREAD[targets]
    slots: dict[str, list[int]] = {"one packing": [], "8 packings": []}
    for index, rank in enumerate((*spread, *[mean] * len(spread))):
        save_adapter(model_folder, folder / f"t{index}", lora(targets, rank), 2)
        engine.write(index + 1, engine.read(Directory(folder).read(f"t{index}")))
        slots["8 packings" if index < len(spread) else "one packing"].append(index + 1)
    works = {name: partial(engine.predict, rows_of(of)) for name, of in slots.items()}
    taken = in_turns(works, ROUNDS["MiniLM"])
    return {
        "part": "packings",
        "base": "MiniLM",
        "quantization": quantization,
        "targets": targets,
        "ranks": spread,
        "median_ms": {name: 1e3 * statistics.median(runs) for name, runs in taken.items()},
        "eight_by_one": ratio(taken, "8 packings", "one packing"),
    }


def _of(rows: Sequence[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["part"] == part]


def _format(row: dict[str, Any]) -> str:
    return "fp32" if row["quantization"] == "none" else str(row["quantization"])


def by_base(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What was found of each base's fleet."""
    return {base: [row for row in _of(rows, "bytes") if row["base"] == base] for base in BASES}


def of_sum(found: Sequence[dict[str, Any]]) -> float:
    """Bank's bytes by own bytes, of all adapters together."""
    return float(sum(row["bank_bytes"] for row in found) / sum(row["own_bytes"] for row in found))


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    sizes = []
    for base, found in by_base(rows).items():
        most = max(found, key=lambda row: row["by_own"])
        smallest, largest = (end(row["own_bytes"] for row in found) for end in (min, max))
        sizes.append(
            [
                base,
                str(len(found)),
                f"{smallest / 1024:,.0f} to {largest / 1024:,.0f} KiB",
                f"{of_sum(found):.3f}",
                f"{most['by_own']:.2f} ({most['adapter']})",
                f"{max(row['by_file'] for row in found):.2f}",
            ]
        )
    columns = ["base", "adapters", "own bytes", "bank by own, in sum", "at most", "by the file's"]
    beside = [
        [row["base"], _format(row)]
        + [f"{row['bytes'][kind] / 2**20:.2f} MiB" for kind in ("narrow", "wide")]
        + [f"{row['median_ms']['without']:.0f} ms", f"{row['median_ms']['with']:.0f} ms"]
        + [f"{row['with_by_without']:.3f}", f"{row['again_by_without']:.3f}"]
        for row in _of(rows, "narrow")
    ]
    packed = [
        [row["base"], _format(row), row["targets"]]
        + [f"{row['median_ms'][name]:.0f} ms" for name in ("one packing", "8 packings")]
        + [f"{row['eight_by_one']:.2f}"]
        for row in _of(rows, "packings")
    ]
    sizes_table = table(columns, sizes)
    columns = ["base", "base in", "narrow takes", "wide takes", "batch of narrow, none wide"]
    columns += [f"{WIDE} wide resident", "ratio", "none wide, again"]
    beside_table = table(columns, beside)
    columns = ["base", "base in", "adapters", "8 of one rank", "8 of 8 ranks", "ratio"]
    return "\n\n".join([sizes_table, beside_table, table(columns, packed)])


def draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    for base, found in by_base(rows).items():
        own = [row["own_bytes"] / 2**20 for row in found]
        left.plot(own, [row["by_own"] for row in found], "o", markersize=4, label=base)
    left.axhline(1.5, color="black", linewidth=0.8, linestyle="--")
    left.set_xscale("log")
    left.set_ylim(0.9, 1.6)
    left.set_xlabel("an adapter's own MiB")
    left.set_ylabel("what it takes of the bank, by that")
    left.legend()
    found = _of(rows, "narrow")
    names = [f"{row['base']}\n{_format(row)}" for row in found]
    bars(
        right,
        names,
        {
            "none wide, again": [row["again_by_without"] for row in found],
            "8 wide resident": [row["with_by_without"] for row in found],
        },
    )
    right.axhline(1, color="black", linewidth=0.8, zorder=0)
    right.set_ylabel("time of a batch of narrow rows,\nnone wide = 1")


def in_short(rows: Sequence[dict[str, Any]]) -> str:
    found = _of(rows, "bytes")
    return (
        f"{len(found)} adapters of LoRA (ranks {min(RANKS)} to {max(RANKS)}), DoRA and IA3: each "
        f"takes at most {max(row['by_own'] for row in found):.2f} times its own bytes, all "
        f"together {max(of_sum(of) for of in by_base(rows).values()):.3f} times."
    )
