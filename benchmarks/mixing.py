"""What does mixing cost? A batch of k adapters against the plain base, and against PEFT's ways.

32 rows of 32 tokens. The plain base is transformers' model with one head; the merged one is it with
one adapter merged into it, which serves one task. Their linears are quantised as ours are. PEFT has
all adapters loaded, in fp32 beside our int8 too. Speeds are shares of the plain base's.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from adapters.directory import Directory
from benchmarks.bars import bars
from benchmarks.bases import TARGETS, base_folder, with_adapters
from benchmarks.peers.merged import answer_alone, merged_model
from benchmarks.peers.peft_model import answer_in_a_loop, answer_mixed
from benchmarks.record import table
from benchmarks.timing import Seconds, in_turns, ratio
from deployments.model.engine import Engine
from deployments.model.quantize import Quantization, quantize
from deployments.rows import Row, Tokens

ROWS, TOKENS = 32, 32
COUNTS = (1, 8, 32)
ROUNDS = {"MiniLM": 15, "BERT-base": 7}
HEAD = {"classifier"}
PEERS = ("PEFT mixed", "PEFT loop")
# Speeds at every k; PEFT's times, mixed and in a loop, of PEFT and ours both in fp32.
TO_REACH = {
    ("MiniLM", "q,v r=8", "none"): "0.92; 1.3x, 2.5x",
    ("MiniLM", "q,v r=8", "int8"): "0.88",
    ("MiniLM", "all-linear r=16", "none"): "0.85; 2.5x, 2.5x",
    ("MiniLM", "all-linear r=16", "int8"): "0.65",
    ("BERT-base", "q,v r=8", "none"): "0.96; 1.3x, 2.0x",
    ("BERT-base", "all-linear r=16", "none"): "0.92; 2.5x, 2.0x",
}
Work = Callable[[], object]


def measure() -> Iterator[dict[str, Any]]:
    """Every base, targets and quantisation."""
    with tempfile.TemporaryDirectory() as folder:
        for base in ROUNDS:
            model_folder = base_folder(base, Path(folder))
            for targets in TARGETS:
                store = Path(folder) / base / targets.replace(" ", "-").replace(",", "-")
                peft = with_adapters(model_folder, targets, max(COUNTS))
                for name in peft.peft_config:
                    peft.save_pretrained(str(store / "_"), selected_adapters=[name])
                    (store / "_" / name).rename(store / name)
                for quantization in ("none", "int8"):
                    works = models_alone(model_folder, store, quantization)
                    works |= ours(model_folder, Directory(store), quantization)
                    works |= peers(peft)
                    taken = in_turns(works, ROUNDS[base])
                    yield row_of(base, targets, quantization, taken)


def inputs() -> list[list[int]]:
    """The same rows for everybody."""
    dice = torch.Generator().manual_seed(0)
    return torch.randint(1000, 9000, (ROWS, TOKENS), generator=dice).tolist()


def models_alone(base: str, store: Path, quantization: Quantization) -> dict[str, Work]:
    """The plain base, and a merged model."""
    models = {
        "plain": AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).eval(),
        "merged": merged_model(base, str(store / "a0")),
    }
    ids, works = torch.tensor(inputs()), {}
    for name, model in models.items():
        quantize(model, HEAD, quantization, torch.device("cpu"))
        works[name] = lambda model=model: answer_alone(model, ids)
    return works


def ours(base: str, store: Directory, quantization: Quantization) -> dict[str, Work]:
    """Our batches of 1, 8 and 32 adapters."""
    engine = Engine(base, quantization=quantization, device="cpu")
    for index in range(max(COUNTS)):
        engine.write(index + 1, engine.read(store.read(f"a{index}")))
    works: dict[str, Work] = {}
    for count in COUNTS:
        rows = [Row(1 + index % count, Tokens(ids)) for index, ids in enumerate(inputs())]
        works[f"k={count}"] = lambda rows=rows: run_ours(engine, rows)
    return works


def run_ours(engine: Engine, rows: list[Row]) -> torch.Tensor:
    with torch.inference_mode():
        return engine.logits(rows)


def peers(peft: Any) -> dict[str, Work]:
    """PEFT's two ways with 32 adapters."""
    ids = torch.tensor(inputs())
    mask, names = torch.ones_like(ids), [f"a{index}" for index in range(ROWS)]
    return {
        "PEFT mixed": lambda: answer_mixed(peft, ids, mask, names),
        "PEFT loop": lambda: answer_in_a_loop(peft, ids, mask, names),
    }


def row_of(base: str, targets: str, quantization: str, taken: Seconds) -> dict[str, Any]:
    shares = ("merged", *(f"k={count}" for count in COUNTS))
    return {
        "base": base,
        "targets": targets,
        "quantization": quantization,
        "median_ms": {name: 1e3 * statistics.median(runs) for name, runs in taken.items()},
        "of_plain": {name: ratio(taken, "plain", name) for name in shares if name in taken},
        "peers_by_ours": {
            name: ratio(taken, name, f"k={max(COUNTS)}") for name in PEERS if name in taken
        },
    }


def _format(row: dict[str, Any]) -> str:
    return "fp32" if row["quantization"] == "none" else str(row["quantization"])


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    shares = {"merged": "merged alone", **{f"k={k}": f"k={k}" for k in COUNTS}}
    lines = []
    for row in rows:
        speed, by = row["of_plain"], row["peers_by_ours"]
        lines.append(
            [row["base"], row["targets"], _format(row)]
            + [f"{speed[name]:.2f}" if name in speed else "–" for name in shares]
            + [f"{by[name]:.1f}x our time" if name in by else "–" for name in PEERS]
            + [TO_REACH.get((row["base"], row["targets"], row["quantization"]), "")]
        )
    return table(["base", "adapters", "base in", *shares.values(), *PEERS, "to reach"], lines)


def draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:
    axes = figure.subplots()
    names = list(rows[0]["of_plain"])
    speeds = {name: [row["of_plain"].get(name) for row in rows] for name in names}
    for name in PEERS:
        speeds[name] = [
            row["of_plain"][f"k={max(COUNTS)}"] / row["peers_by_ours"][name]
            if name in row["peers_by_ours"]
            else None
            for row in rows
        ]
    groups = [f"{row['base']}\n{row['targets']}\n{_format(row)}" for row in rows]
    bars(axes, groups, speeds)
    axes.axhline(1, color="black", linewidth=0.8, zorder=0)
    axes.set_ylabel("speed, plain base = 1")


def in_short(rows: Sequence[dict[str, Any]]) -> str:
    most = f"k={max(COUNTS)}"
    told = []
    for quantization, name in (("none", "fp32"), ("int8", "int8")):
        of = [row for row in rows if row["quantization"] == quantization]
        low, high = _ends(row["of_plain"][most] for row in of)
        mixed, loop = (_ends(row["peers_by_ours"][peer] for row in of) for peer in PEERS)
        told.append(
            f"In {name} a batch of {max(COUNTS)} adapters runs at {low:.2f} to {high:.2f} of the "
            f"plain base's speed; PEFT in fp32 takes {mixed[0]:.1f} to {mixed[1]:.1f} times our "
            f"time for a mixed batch, {loop[0]:.1f} to {loop[1]:.1f} times in a `set_adapter` loop."
        )
    return " ".join(told)


def _ends(values: Iterable[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[0], ordered[-1]
