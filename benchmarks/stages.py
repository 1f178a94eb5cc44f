"""Where does the time go? From a text to its labels, by stage.

64 callers ask for one sentence of `examples/data/` after the other, in process and without HTTP and
Ray: the ingress's call, its tokenizer, the model's queue, the engine on MiniLM in int8. A request
passes its stages one after the other: `tokenise` is on the tokenizer's thread; `queue` is all
waiting until the forward that takes it begins; `pack`, `base`, `LoRA`, `head` and `post` are that
forward's on the device's one thread, and count whole for each of its rows; to `post` also belongs
what follows until the caller has the answer. Inside a forward every moment is charged to the
function that was entered last, so that LoRA is what sites do beside the base's modules. Of the
device's thread, `queue` is the time in which no forward ran. The total is on the callers' own
clocks, the thread's on that of the run; the script fails unless the stages sum to both within 3 %.
The forward has the machine's CPUs but one, as in the server (docs/adr/0005).
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from adapters.directory import Directory
from benchmarks.bases import TARGETS, base_folder, save_each, with_adapters
from benchmarks.clock import Clock, watched
from benchmarks.examples import BASE, STORE, STORE_FOLDER, example_texts
from benchmarks.record import table
from deployments.config import Args
from deployments.ingress import runs
from deployments.ingress.calls import Answers, Encodings
from deployments.ingress.folders import Folders
from deployments.ingress.predict import Predictor
from deployments.ingress.tasks import Tasks
from deployments.ingress.wire import PredictRequest
from deployments.model.deployment import Model
from deployments.model.vocabulary import export_vocabulary
from deployments.room import Room
from deployments.rows import Facts, Row
from deployments.tokens import Tokenizer

STAGES = ("tokenise", "queue", "pack", "base", "LoRA", "head", "post")
ADAPTERS, CALLERS, TEXTS, ROUNDS = 32, 64, 1024, 5
CLOSE = 0.03
Asked = Sequence[tuple[str, str]]  # (task, text)


def measure() -> Iterator[dict[str, Any]]:
    """The four example adapters, and 32 random ones of each targets."""
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # else a line for each load
    names = STORE.tasks()
    texts = example_texts()[:TEXTS]
    asked = [(names[slot - 1], text) for slot, text in texts]
    yield asyncio.run(row_of("4 of examples/", STORE_FOLDER, asked))
    with tempfile.TemporaryDirectory() as folder:
        for number, targets in enumerate(TARGETS):
            store = Path(folder) / str(number)
            save_each(with_adapters(base_folder("MiniLM", store), targets, ADAPTERS), store)
            mixed = [(f"a{i % ADAPTERS}", text) for i, (_, text) in enumerate(texts)]
            yield asyncio.run(row_of(f"{ADAPTERS}, {targets}", str(store), mixed))


async def row_of(adapters: str, store: str, asked: Asked) -> dict[str, Any]:
    """Runs with and without a watch, in turns; the one of median latency is told."""
    model = object.__new__(Model)
    await model.__init__(  # type: ignore[misc]  # Ray Serve awaits it
        Args(base_model=BASE, adapter_store=store, quantization="int8", device="cpu")
    )
    tokenizer = Tokenizer(export_vocabulary(model.engine.encoder))
    tasks = Tasks(Folders(Directory(store), model.describe), model.describe)

    async def ask_model(facts: Facts, inputs: Encodings, _: float | None = None) -> Answers:
        return await model.predict(facts["task"], facts["version"], facts["problem_type"], inputs)

    predictor = Predictor(tasks, tokenizer, ask_model, Room(4 * TEXTS), max_rows=TEXTS)
    await ask(predictor, asked)  # loads the adapters, and the planner learns
    profiles, bare_s = [], []
    for _ in range(ROUNDS):
        bare_s.append((await ask(predictor, asked)).run_s)
        profiles.append(await profile(model, predictor, asked))
    slower = [one.run_s / bare for one, bare in zip(profiles, bare_s, strict=True)]
    chosen = sorted(profiles, key=lambda one: one.total_s)[ROUNDS // 2]
    return {
        "adapters": adapters,
        "quantization": "int8",
        "callers": CALLERS,
        "texts": len(asked),
        "texts_per_s": len(asked) / chosen.run_s,
        "rows_a_forward": len(asked) / chosen.num_forwards,
        "request_ms": {name: 1e3 * s / len(asked) for name, s in chosen.of_requests.items()},
        "request_total_ms": 1e3 * chosen.total_s / len(asked),
        "device_share": {name: s / chosen.run_s for name, s in chosen.of_device.items()},
        "sum_by_total": [sum(one.of_requests.values()) / one.total_s for one in profiles],
        "device_sum_by_total": [sum(one.of_device.values()) / one.run_s for one in profiles],
        "watched_by_bare": statistics.median(slower),
    }


@dataclass(slots=True)
class Times:
    """What callers saw, in seconds on one clock.

    Attributes:
        began: The sum over all requests of when they were made.
        ended: The sum of when they were answered.
        total_s: From each caller's beginning to its end, of all callers.
        run_s: From the first beginning to the last end.
    """

    began: float = 0.0
    ended: float = 0.0
    total_s: float = 0.0
    run_s: float = 0.0


@dataclass(slots=True)
class Profile:
    """Seconds by stage, of all requests together and of the device's thread."""

    total_s: float
    run_s: float
    num_forwards: int
    of_requests: dict[str, float]
    of_device: dict[str, float]


@dataclass(slots=True)
class Forwards:
    """What the device's thread did; every sum is over forwards, `of_rows` over their rows."""

    of_rows: Counter[str] = field(default_factory=Counter)
    busy: Counter[str] = field(default_factory=Counter)
    spans: list[tuple[float, float, int]] = field(default_factory=list)  # begin, end, rows


async def ask(predictor: Predictor, asked: Asked) -> Times:
    """Let the callers ask all, each its next when it has its answer."""
    left, times, now = iter(asked), Times(), time.perf_counter

    async def caller() -> None:
        began_s = now()
        for task, text in left:
            times.began += now() - began_run_s
            answer = await predictor.predict(task, PredictRequest(text=text))
            times.ended += now() - began_run_s
            if "error" in answer["results"][0]:
                raise RuntimeError(f"{task}: {answer['results'][0]['error']}")
        times.total_s += now() - began_s

    began_run_s = now()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    times.run_s = now() - began_run_s
    return times


async def profile(model: Model, predictor: Predictor, asked: Asked) -> Profile:
    """Ask all under a watch.

    Raises:
        ValueError: The stages do not sum to the total.
    """
    clock, forwards, now = Clock(), Forwards(), time.perf_counter
    tokenised_s: list[float] = []  # appended to by several threads
    encode = runs.encode

    def timed_encode(*args: Any) -> Any:
        began_s = now()
        try:
            return encode(*args)
        finally:
            tokenised_s.append(now() - began_s)

    def timed_predict(rows: list[Row]) -> Any:
        clock.seconds.clear()
        began_s = now()
        answers = predict(rows)
        forwards.spans.append((began_s, now(), len(rows)))
        forwards.busy.update(clock.seconds)
        forwards.of_rows.update({k: s * len(rows) for k, s in clock.seconds.items()})
        return answers

    with patch.object(runs, "encode", timed_encode), watched(model.engine, clock):
        predict: Callable[[list[Row]], Any] = model.engine.predict
        with patch.object(model.engine, "predict", timed_predict):
            began_s = now()
            times = await ask(predictor, asked)
    found = add_up(times, forwards, sum(tokenised_s), began_s)
    if sum(rows for *_, rows in forwards.spans) != len(asked):
        raise ValueError("some rows went through no forward, or through two")
    for what, stages, total_s in (
        ("a request", found.of_requests, found.total_s),
        ("the device's thread", found.of_device, found.run_s),
    ):
        if abs(sum(stages.values()) / total_s - 1) > CLOSE or min(stages.values()) < 0:
            raise ValueError(f"the stages of {what} do not sum to {total_s:.3f} s: {stages}")
    return found


def add_up(times: Times, forwards: Forwards, tokenised_s: float, began_s: float) -> Profile:
    """Seconds by stage; waiting is between two moments, each summed over all requests."""
    taken = sum(rows * (begin - began_s) for begin, _, rows in forwards.spans)
    given = sum(rows * (end - began_s) for _, end, rows in forwards.spans)
    of_requests = {stage: forwards.of_rows[stage] for stage in STAGES}
    of_requests["tokenise"] = tokenised_s
    of_requests["queue"] = taken - times.began - tokenised_s
    of_requests["post"] += times.ended - given
    of_device = {stage: forwards.busy[stage] for stage in STAGES if stage != "tokenise"}
    ends = [began_s, *(end for _, end, _ in forwards.spans)]
    begins = [*(begin for begin, _, _ in forwards.spans), began_s + times.run_s]
    of_device["queue"] = sum(begin - end for begin, end in zip(begins, ends, strict=True))
    return Profile(times.total_s, times.run_s, len(forwards.spans), of_requests, of_device)


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        spent, share = row["request_ms"], row["device_share"]
        sums = row["sum_by_total"], row["device_sum_by_total"]
        far = [max(abs(one - 1) for one in each) for each in sums]
        lines.append(
            [row["adapters"], "a request, ms"]
            + [f"{spent[stage]:.2f}" for stage in STAGES]
            + [f"{row['request_total_ms']:.1f}", f"{100 * far[0]:.1f} %"]
        )
        lines.append(
            ["", "the device's thread, %"]
            + [f"{100 * share[stage]:.1f}" if stage in share else "–" for stage in STAGES]
            + ["100", f"{100 * far[1]:.1f} %"]
        )
    return table(["adapters", "time of", *STAGES, "total", "sum is off by at most"], lines)


def draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row["adapters"] for row in rows]
    palette = ["#b8b03a", "#d0d0d0", "#8a5fb0", "#1b6ca8", "#e07b39", "#3a9d6e", "#7a7a7a"]
    for axes, spent in (
        (left, [row["request_ms"] for row in rows]),
        (right, [{k: 100 * v for k, v in row["device_share"].items()} for row in rows]),
    ):
        before = [0.0] * len(rows)
        for stage, colour in zip(STAGES, palette, strict=True):
            widths = [one.get(stage, 0.0) for one in spent]
            axes.barh(names, widths, left=before, height=0.6, label=stage, color=colour)
            before = [a + b for a, b in zip(before, widths, strict=True)]
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
    left.set_xlabel(f"ms of a request, {CALLERS} callers")
    right.set_xlabel("% of the device's thread")
    left.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(STAGES))


def in_short(rows: Sequence[dict[str, Any]]) -> str:
    busy = [row["device_share"] for row in rows]
    base, lora = ([one[k] / (1 - one["queue"]) for one in busy] for k in ("base", "LoRA"))
    return (
        f"Of the time of int8 forwards on MiniLM the base takes {100 * min(base):.0f} to "
        f"{100 * max(base):.0f} %, adapters {100 * min(lora):.0f} to {100 * max(lora):.0f} %."
    )
