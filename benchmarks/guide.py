"""What does the inference guide's own table say? Batches of 1 to 32 texts of 128 tokens.

Texts in, labels out, on MiniLM with the example's `sentiment` adapter: the guide's function with
its LoRA model and with the merged one, beside ours, tokenised by our tokenizer and split into
forwards by the server's planner. Throughput saturates at the smallest batch that has 95 % of the
best samples a second.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from transformers import AutoTokenizer

from benchmarks.examples import (
    BASE,
    STORE,
    STORE_FOLDER,
    example_engine,
    example_planner,
    example_tokenizer,
)
from benchmarks.peers.guide import load, predict_sentiment
from benchmarks.peers.merged import merged_model
from benchmarks.record import table
from benchmarks.timing import in_turns, timed
from deployments.model.budget import Budget
from deployments.model.engine import Engine
from deployments.rows import Prediction, Row
from deployments.tokens import Tokenizer

SIZES = (1, 4, 8, 16, 32)
LENGTH, ROUNDS = 128, 7
TASK = "sentiment"
LABELS = ("Negative", "Positive")
TEXT = "This is a test " * (LENGTH // 4)  # the guide's
GUIDE, GUIDE_MERGED = "the guide's function", "the guide's function, merged"
OURS, OURS_INT8 = "ours", "ours, int8"
WAYS = (GUIDE, GUIDE_MERGED, OURS, OURS_INT8)


def measure() -> Iterator[dict[str, Any]]:
    """Every way, all batch sizes in turns."""
    adapter = f"{STORE_FOLDER}/{TASK}"
    model, tokenizer = load(BASE, adapter)
    merged = merged_model(BASE, adapter)
    ask = {
        GUIDE: partial(predict_sentiment, model=model, tokenizer=tokenizer),
        GUIDE_MERGED: partial(
            predict_sentiment, model=merged, tokenizer=AutoTokenizer.from_pretrained(BASE)
        ),
        OURS: ours("none"),
        OURS_INT8: ours("int8"),
    }
    works = {
        f"{way}|{size}": partial(answer, [TEXT] * size)
        for size in SIZES
        for way, answer in ask.items()
    }
    taken = in_turns(works, ROUNDS)
    for way in WAYS:
        seconds = {size: statistics.median(taken[f"{way}|{size}"]) for size in SIZES}
        samples_per_s = {size: size / seconds[size] for size in SIZES}
        yield {
            "way": way,
            "batches": [
                {
                    "batch_size": size,
                    "samples_per_second": samples_per_s[size],
                    "avg_time_per_sample_ms": 1e3 * seconds[size] / size,
                    "avg_time_per_batch_ms": 1e3 * seconds[size],
                }
                for size in SIZES
            ],
            "saturates_at": next(
                size for size in SIZES if samples_per_s[size] >= 0.95 * max(samples_per_s.values())
            ),
        }


def ours(quantization: str) -> Any:
    engine = example_engine(quantization)
    return partial(
        answer, engine, example_tokenizer(engine), example_planner(), 1 + STORE.tasks().index(TASK)
    )


def answer(
    engine: Engine, tokenizer: Tokenizer, planner: Budget, slot: int, texts: list[str]
) -> list[str]:
    """The labels of texts, through as many forwards as the planner makes of them."""
    rows = [Row(slot, one.tokens) for one in tokenizer.encode(texts, LENGTH)]
    waiting, labels = list(range(len(rows))), [""] * len(rows)
    while waiting:
        picked = set(planner.pick([rows[index].num_tokens for index in waiting]))
        batch = [index for place, index in enumerate(waiting) if place in picked]
        waiting = [index for place, index in enumerate(waiting) if place not in picked]
        predictions: list[Any] = []
        seconds = timed(lambda: predictions.extend(engine.predict([rows[i] for i in batch])))  # noqa: B023
        planner.note([rows[index].num_tokens for index in batch], seconds)
        for index, prediction in zip(batch, predictions, strict=True):
            assert isinstance(prediction, Prediction)
            labels[index] = LABELS[prediction.scores.index(max(prediction.scores))]
    return labels


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            row["way"],
            str(one["batch_size"]) + (" (saturates)" if saturated(row, one) else ""),
            f"{one['samples_per_second']:.1f}",
            f"{one['avg_time_per_sample_ms']:.1f}",
            f"{one['avg_time_per_batch_ms']:.1f}",
        ]
        for row in rows
        for one in row["batches"]
    ]
    return table(["", "batch size", "samples/s", "ms a sample", "ms a batch"], lines)


def saturated(row: dict[str, Any], batch: dict[str, Any]) -> bool:
    return bool(row["saturates_at"] == batch["batch_size"])


def draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:
    axes = figure.subplots()
    for row in rows:
        speeds = [one["samples_per_second"] for one in row["batches"]]
        (line,) = axes.plot(SIZES, speeds, marker="o", markersize=3, label=row["way"])
        at = row["saturates_at"]
        axes.plot(
            at, speeds[SIZES.index(at)], "o", markersize=9, mfc="none", color=line.get_color()
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size (ringed: where throughput saturates)")
    axes.set_ylabel("samples/s")
    axes.legend()


def in_short(rows: Sequence[dict[str, Any]]) -> str:
    best = {row["way"]: max(one["samples_per_second"] for one in row["batches"]) for row in rows}
    at = {row["way"]: row["saturates_at"] for row in rows}
    return (
        f"The guide's own benchmark (texts of {LENGTH} tokens): {best[OURS]:.0f} texts a second in "
        f"fp32 and {best[OURS_INT8]:.0f} in int8, beside {best[GUIDE]:.0f} of the guide's function "
        f"and {best[GUIDE_MERGED]:.0f} with the merged model; ours saturates at a batch of "
        f"{at[OURS]}, in int8 {at[OURS_INT8]}, the guide's at {at[GUIDE]}."
    )
