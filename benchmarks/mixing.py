"""What does mixing cost? A batch of k adapters against the plain base, and against PEFT's ways.

32 rows of 32 tokens. The plain base is transformers' model with one head, its linears quantised
as ours are. PEFT has all adapters loaded, in fp32.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from adapters.store import Store
from benchmarks.bases import TARGETS, base_folder, with_adapters
from benchmarks.peers.peft_model import answer_in_a_loop, answer_mixed
from benchmarks.record import save, table
from benchmarks.timing import Seconds, in_turns, ratio
from deployments.model.engine import Engine
from deployments.model.quantize import Quantization, quantize
from deployments.rows import Row, Tokens

ROWS, TOKENS = 32, 32
COUNTS = (1, 8, 32)
ROUNDS = {"MiniLM": 15, "BERT-base": 7}
HEAD = {"classifier"}


def main() -> None:
    """Measure every base, targets and quantisation; print and save."""
    found: list[dict[str, object]] = []
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
                    works = ours(model_folder, Store(store), quantization)
                    works |= peers(peft) if quantization == "none" else {}
                    taken = in_turns(works, ROUNDS[base])
                    found.append(row_of(base, targets, quantization, taken))
                    print(found[-1], file=sys.stderr, flush=True)
    save("mixing", found)
    print(as_table(found))


def inputs() -> list[list[int]]:
    """The same rows for everybody."""
    dice = torch.Generator().manual_seed(0)
    return torch.randint(1000, 9000, (ROWS, TOKENS), generator=dice).tolist()


def ours(base: str, store: Store, quantization: Quantization) -> dict[str, Callable[[], object]]:
    """The plain base, and our batches of 1, 8 and 32 adapters."""
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).eval()
    quantize(plain, HEAD, quantization, torch.device("cpu"))
    engine = Engine(base, quantization=quantization, device="cpu")
    for index in range(max(COUNTS)):
        engine.write(index + 1, engine.read(store.read(f"a{index}")))
    works: dict[str, Callable[[], object]] = {"plain": lambda: run_plain(plain)}
    for count in COUNTS:
        rows = [Row(1 + index % count, Tokens(ids)) for index, ids in enumerate(inputs())]
        works[f"k={count}"] = lambda rows=rows: run_ours(engine, rows)
    return works


def run_plain(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.tensor(inputs())
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits


def run_ours(engine: Engine, rows: list[Row]) -> torch.Tensor:
    with torch.inference_mode():
        return engine.logits(rows)


def peers(peft: object) -> dict[str, Callable[[], object]]:
    """PEFT's two ways with 32 adapters."""
    ids = torch.tensor(inputs())
    mask, names = torch.ones_like(ids), [f"a{index}" for index in range(ROWS)]
    return {
        "PEFT mixed": lambda: answer_mixed(peft, ids, mask, names),  # type: ignore[arg-type]
        "PEFT loop": lambda: answer_in_a_loop(peft, ids, mask, names),  # type: ignore[arg-type]
    }


def row_of(base: str, targets: str, quantization: str, taken: Seconds) -> dict[str, object]:
    most = f"k={max(COUNTS)}"
    return {
        "base": base,
        "targets": targets,
        "quantization": quantization,
        "median_ms": {name: 1e3 * statistics.median(runs) for name, runs in taken.items()},
        "of_plain": {f"k={k}": ratio(taken, "plain", f"k={k}") for k in COUNTS},
        "peers_by_ours": {
            name: ratio(taken, name, most) for name in ("PEFT mixed", "PEFT loop") if name in taken
        },
    }


def as_table(found: list[dict[str, object]]) -> str:
    columns = [
        "base",
        "adapters",
        "base in",
        *(f"k={k}" for k in COUNTS),
        "PEFT mixed",
        "PEFT loop",
    ]
    rows = []
    for one in found:
        speed: dict[str, float] = one["of_plain"]  # type: ignore[assignment]
        by: dict[str, float] = one["peers_by_ours"]  # type: ignore[assignment]
        in_words = "fp32" if one["quantization"] == "none" else str(one["quantization"])
        peers_of = [f"{by[name]:.1f}x slower" if name in by else "–" for name in columns[-2:]]
        shares = [f"{speed[f'k={k}']:.2f}" for k in COUNTS]
        rows.append([str(one["base"]), str(one["targets"]), in_words, *shares, *peers_of])
    return table(columns, rows)
