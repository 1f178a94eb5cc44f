"""What does int8 give on a CPU? Against fp32, and against ONNX Runtime's int8.

BERT-base with random weights and one head, the same in all ways, in batches of 32 rows of 64 tokens
and one row of 8 alone. A neighbour's effect is the largest change of a row's logits when the other
31 rows are others, or are loud: full of a token whose activations are 20 times larger. Agreement is
of labels between our engine in fp32 and in int8, over all held-out rows of the four example tasks
on MiniLM; a row of several labels agrees if all do.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from adapters.directory import Directory
from benchmarks.bases import ROOT
from benchmarks.record import table
from benchmarks.timing import in_turns, ratio
from deployments.model.allocator import CPU_MEMORY
from deployments.model.engine import Engine
from deployments.model.quantize import Quantization, quantize
from deployments.rows import Row, Tokens

PACKAGES = ("onnxruntime", "onnx")
WAYS = ("fp32", "int8", "ONNX Runtime fp32", "ONNX Runtime int8")
SHAPES = {(32, 64): 11, (1, 8): 101}  # (rows, tokens) -> rounds
LOUD, LOUDER = 29_999, 20.0  # a token id; its activations by an ordinary row's
MAX_LENGTH, BATCH = 128, 32
Way = Callable[[torch.Tensor], torch.Tensor]  # ids, [rows, tokens] int64 -> logits, [rows, labels]


def measure() -> Iterator[dict[str, Any]]:
    """Each shape's times, the neighbours' effect, the agreement."""
    with tempfile.TemporaryDirectory() as folder:
        found = ways(Path(folder))
        for (rows, tokens), rounds in SHAPES.items():
            yield times(found, rows, tokens, rounds)
        yield neighbours(found)
    yield agreement()


def ways(folder: Path) -> dict[str, Way]:
    """The same model four times."""
    # Imported here: what was saved is shown without the packages that measured it.
    from benchmarks.peers.onnx_runtime import answer, export, session

    files = export(bert("eager"), folder)
    threads = torch.get_num_threads()
    ours = {"fp32": bert(), "int8": bert()}
    quantize(ours["int8"], {"classifier"}, "int8", torch.device("cpu"))
    found: dict[str, Way] = {
        name: (lambda ids, model=model: run(model, ids)) for name, model in ours.items()
    }
    for name, path in files.items():
        peer = session(path, threads)
        found[f"ONNX Runtime {name}"] = lambda ids, peer=peer: answer(peer, ids)
    return found


def bert(attention: str = "sdpa") -> Any:
    """BERT-base, always the same, with one loud token.

    It alone has a first feature, and the embeddings' norm makes that one loud. In the table of
    embeddings it is as small as any: ONNX Runtime quantises the table too, with one scale, and a
    large entry there would round every other token to zero.
    """
    torch.manual_seed(0)
    config = BertConfig()
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    model.eval().requires_grad_(False)
    embeddings = model.bert.embeddings
    for module in embeddings.children():
        if isinstance(module, nn.Embedding):
            module.weight[:, 0] = 0
    embeddings.word_embeddings.weight[LOUD, 0] = embeddings.word_embeddings.weight.abs().max()
    ordinary = embeddings(inputs(32, 64)).abs().max()
    loud = embeddings(torch.full((1, 64), LOUD))[..., 0].abs().mean()
    embeddings.LayerNorm.weight[0] = LOUDER * ordinary / loud
    return model


def run(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits


def inputs(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(1000, 9000, (rows, tokens), generator=dice)


def times(found: dict[str, Way], rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    ids = inputs(rows, tokens)
    works: dict[str, Callable[[], object]] = {}
    for name in WAYS:
        works[name] = lambda way=found[name]: way(ids)
        # ONNX Runtime's threads spin for a while after they have answered.
        works[f"after {name}"] = lambda: time.sleep(0.02)
    taken = in_turns(works, rounds)
    return {
        "measured": "times",
        "rows": rows,
        "tokens": tokens,
        "median_ms": {name: 1e3 * statistics.median(taken[name]) for name in WAYS},
        "by_int8": {name: ratio(taken, name, "int8") for name in WAYS},
        "environment": {name: os.environ.get(name) for name in CPU_MEMORY},
    }


def neighbours(found: dict[str, Way]) -> dict[str, Any]:
    """Each way's largest change of the first row's logits when its neighbours change."""
    shape = next(iter(SHAPES))
    ids, others, loud = inputs(*shape), inputs(*shape, seed=1), torch.full(shape, LOUD)
    others[0] = loud[0] = ids[0]
    exact = found["fp32"](ids)
    effect, error = {}, {}
    for name, way in found.items():
        logits = way(ids)
        # A way that answers every row alike would show no effect at all.
        spread, wanted = logits.std(dim=0).mean(), exact.std(dim=0).mean()
        if spread < wanted / 2:
            raise RuntimeError(f"{name} does not tell rows apart: {spread:.1e}, not {wanted:.1e}")
        error[name] = (logits - exact).abs().max().item()
        effect[name] = {
            "others": (way(others)[0] - logits[0]).abs().max().item(),
            "loud": (way(loud)[0] - logits[0]).abs().max().item(),
        }
    embeddings = bert().bert.embeddings
    louder = embeddings(loud[1:]).abs().max() / embeddings(ids).abs().max()
    return {"measured": "neighbours", "effect": effect, "error": error, "louder": louder.item()}


def agreement() -> dict[str, Any]:
    """The share of held-out rows with the same labels in fp32 and in int8."""
    store = Directory(ROOT / "examples" / "store")
    fp32, int8 = (labels_of(store, quantization) for quantization in ("none", "int8"))
    same = {task: [a == b for a, b in zip(fp32[task], int8[task], strict=True)] for task in fp32}
    pooled = [one for of_task in same.values() for one in of_task]
    return {
        "measured": "agreement",
        "rows": len(pooled),
        "agreed": statistics.mean(pooled),
        "agreed_of_task": {task: statistics.mean(of_task) for task, of_task in same.items()},
    }


def labels_of(store: Directory, quantization: Quantization) -> dict[str, list[list[int]]]:
    """Task -> the labels of its held-out rows."""
    base = str(ROOT / "examples" / "base")
    engine = Engine(base, quantization=quantization, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(base)
    labels = {}
    for task in store.tasks():
        loaded = engine.read(store.read(task))
        engine.write(1, loaded)
        lines = (ROOT / "examples" / "data" / f"{task}.heldout.jsonl").read_text("utf-8")
        texts = [json.loads(line)["text"] for line in lines.splitlines()]
        given = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        rows = [Row(1, Tokens(ids)) for ids in given]
        several = json.loads(store.read(task).contents["task.json"])["problem_type"][0] == "m"
        labels[task] = []
        for start in range(0, len(rows), BATCH):
            with torch.inference_mode():
                logits = engine.logits(rows[start : start + BATCH])
            for row in logits[:, : loaded.artifact.num_labels]:
                chosen = (row >= 0).nonzero().flatten() if several else row.argmax().unsqueeze(0)
                labels[task].append(chosen.tolist())
    return labels


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    (moved,) = (row for row in rows if row["measured"] == "neighbours")
    (agreed,) = (row for row in rows if row["measured"] == "agreement")
    timed = [row for row in rows if row["measured"] == "times"]
    columns = ["", *(f"{row['rows']} × {row['tokens']}" for row in timed)]
    columns += ["off fp32", "other neighbours", f"{moved['louder']:.0f}x louder ones"]
    lines = []
    for name in WAYS:
        cells = [
            f"{row['median_ms'][name]:.0f} ms, {row['by_int8'][name]:.2f}x int8" for row in timed
        ]
        changes = (moved["error"][name], *moved["effect"][name].values())
        lines.append([name, *cells, *(f"{change:.1g}" for change in changes)])
    said = f"{agreed['agreed']:.2%} of {agreed['rows']} held-out rows"
    return (
        f"{table(columns, lines)}\n\nint8 gives the labels of fp32 for {said}. To reach: 2.0x fp32 "
        "and 1.25x ONNX Runtime int8 with many rows, 1.0x fp32 with one; 1e-5; 98.5 %.\n"
    )


def in_short(rows: Sequence[dict[str, Any]]) -> str:
    batch, alone = (row for row in rows if row["measured"] == "times")
    (agreed,) = (row for row in rows if row["measured"] == "agreement")
    by = batch["by_int8"]
    return (
        f"int8 on a CPU is {by['fp32']:.1f}x as fast as torch's fp32, which is slow on this one, "
        f"{by['ONNX Runtime fp32']:.1f}x ONNX Runtime's fp32 and {by['ONNX Runtime int8']:.2f}x "
        f"its int8; one short row alone is {alone['by_int8']['fp32']:.1f}x as fast as in torch's "
        f"fp32. {agreed['agreed']:.1%} of the labels are fp32's."
    )


def draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:
    """The times of both shapes, one axis each, on an empty matplotlib figure."""
    timed = [row for row in rows if row["measured"] == "times"]
    for axis, row in zip(figure.subplots(1, len(timed)), timed, strict=True):
        axis.bar(
            [name.replace("Runtime ", "Runtime\n") for name in WAYS], row["median_ms"].values()
        )
        axis.set_title(f"BERT-base, {row['rows']} × {row['tokens']} tokens")
        axis.set_ylabel("median ms")
