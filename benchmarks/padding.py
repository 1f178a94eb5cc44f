"""What does padding cost? Real sentences of mixed length, planned and in the order they came.

1,024 sentences of `examples/data/`, the four example adapters mixed, through the engine on MiniLM.
In arrival order they go in 32s, as the inference guide's `batch_predict` does. Planned, the
server's planner picks each batch from all that wait: the whole queue, or 128 rows in it, as each
that goes makes room for the next. Equal: no padding by itself, 32s of rows that are all as long as
the mean, as many tokens altogether. In arrival order layers work on padding, as they do everywhere
else. Tokens a second are real ones, without padding.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.bars import bars
from benchmarks.examples import (
    example_engine,
    example_planner,
    example_rows,
    example_tokenizer,
)
from benchmarks.record import table
from benchmarks.timing import in_turns, ratio, timed
from deployments.model.engine import Engine
from deployments.model.shares import Shares
from deployments.model.waiter import Waiter
from deployments.rows import Row, Tokens

SENTENCES, OF_THE_GUIDE, DEPTH = 1024, 32, 128
ROUNDS = {"none": 3, "int8": 3}
SHALLOW = f"planned, {DEPTH} waiting"
WAYS = ("arrival order", SHALLOW, "planned", "equal")


def measure() -> Iterator[dict[str, Any]]:
    """Each quantisation."""
    for quantization, rounds in ROUNDS.items():
        yield row_of(quantization, rounds)


def row_of(quantization: str, rounds: int) -> dict[str, Any]:
    engine = example_engine(quantization)
    rows = example_rows(example_tokenizer(engine))[:SENTENCES]
    same = equal(rows)
    padded: dict[str, float] = {}  # by real tokens, of each way
    works = {
        "arrival order": lambda: run_padded(engine, in_order(rows)),
        SHALLOW: lambda: run_planned(engine, rows, DEPTH),
        "planned": lambda: run_planned(engine, rows, len(rows)),
        "equal": lambda: run(engine, same),
    }
    noted = {way: partial(note, padded, way, work) for way, work in works.items()}
    assert engine.encoder.is_ragged
    taken = in_turns(noted, rounds)
    lengths = [row.num_tokens for row in rows]
    return {
        "quantization": quantization,
        "tokens": {"mean": statistics.mean(lengths), "max": max(lengths)},
        "tokens_per_s": {way: sum(lengths) / statistics.median(taken[way]) for way in WAYS},
        "of_arrival_order": {way: ratio(taken, WAYS[0], way) for way in WAYS},
        "of_equal": {way: ratio(taken, "equal", way) for way in WAYS},
        "padded_by_real": padded,
        "pick_of_4096_ms": 1e3 * pick_s(lengths * (4096 // len(lengths))),
    }


def note(padded: dict[str, float], way: str, work: Callable[[], list[list[Row]]]) -> None:
    """Run a work, and note how much longer padding makes its batches in the layers."""
    batches = work()
    real = sum(row.num_tokens for batch in batches for row in batch)
    wide = sum(len(b) * max(row.num_tokens for row in b) for b in batches)
    padded[way] = wide / real if way == WAYS[0] else 1.0


def in_order(rows: Sequence[Row]) -> list[list[Row]]:
    return [[*rows[i : i + OF_THE_GUIDE]] for i in range(0, len(rows), OF_THE_GUIDE)]


def equal(rows: Sequence[Row]) -> list[list[Row]]:
    """As many tokens in rows that are all of the mean length."""
    dice, total = random.Random(0), sum(row.num_tokens for row in rows)
    length = round(total / len(rows))
    even = [
        Row(row.slot, Tokens([dice.randrange(1000, 9000) for _ in range(length)])) for row in rows
    ]
    return in_order(even[: round(total / length)])


def run(engine: Engine, batches: list[list[Row]]) -> list[list[Row]]:
    for batch in batches:
        engine.predict(batch)
    return batches


def run_padded(engine: Engine, batches: list[list[Row]]) -> list[list[Row]]:
    engine.encoder.is_ragged = False
    try:
        return run(engine, batches)
    finally:
        engine.encoder.is_ragged = True


def run_planned(engine: Engine, rows: Sequence[Row], depth: int) -> list[list[Row]]:
    """Empty a queue as the server does, so many rows in it at a time."""
    planner, batches = example_planner(), []
    shares = Shares(padded=planner.padded)
    coming = iter(rows)

    def wait(num_rows: int) -> None:
        for row in itertools.islice(coming, num_rows):
            shares.add(Waiter(replace(row, share=str(row.slot), request=id(row)), row))

    wait(depth)
    while shares:
        taken: list[Waiter] = []
        shares.take(planner, taken)
        batch = [waiter.answer for waiter in taken]
        wait(len(batch))
        seconds = timed(partial(engine.predict, batch))
        planner.note([row.num_tokens for row in batch], seconds)
        batches.append(batch)
    return batches


def pick_s(lengths: list[int]) -> float:
    """What a choice takes among so many rows, each of a request of its own."""
    planner = example_planner()
    shares = Shares(padded=planner.padded)
    planner.note([1024], 0.1)
    for index, length in enumerate(lengths):
        shares.add(Waiter(Row(1, Tokens([0] * length), request=index)))
    return statistics.median(timed(partial(shares.take, planner, [])) for _ in range(50))


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        for way in WAYS:
            lines.append(
                [
                    "fp32" if row["quantization"] == "none" else row["quantization"],
                    way,
                    f"{row['tokens_per_s'][way]:,.0f}",
                    f"{row['of_arrival_order'][way]:.2f}",
                    f"{row['of_equal'][way]:.2f}",
                    f"{row['padded_by_real'][way]:.2f}",
                    "2.2; 0.9" if way == "planned" else "",
                ]
            )
    columns = ["base in", "batches", "tokens/s", "of arrival order", "of equal", "padded by real"]
    columns.append("to reach")
    return table(columns, lines)


def draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:
    axes = figure.subplots()
    formats = ["fp32" if row["quantization"] == "none" else row["quantization"] for row in rows]
    bars(axes, formats, {way: [row["tokens_per_s"][way] for row in rows] for way in WAYS})
    axes.set_ylabel("tokens/s, without padding")


def in_short(rows: Sequence[dict[str, Any]]) -> str:
    gains = sorted(row["of_arrival_order"]["planned"] for row in rows)
    return (
        f"Sentences of mixed length, batches planned from the whole queue: {gains[0]:.1f} to "
        f"{gains[-1]:.1f} times the tokens a second of batches of {OF_THE_GUIDE} in arrival order."
    )
