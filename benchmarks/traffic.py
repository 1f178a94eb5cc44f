"""What is asked: one text a request, five tasks in turn, each a sentence that people could write.

The tasks are the four examples and a copy of one. Ray's idiom knows tasks of two labels only, so it
has five copies of the two examples that are such; it and the guide's server, which knows one task,
are asked the same texts in the same order.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

from benchmarks.load import post
from benchmarks.record import ROOT

STORE = ROOT / "examples" / "store"
# Each by the example that it is, and by the one that stands for it in the idiom's store.
TASKS = {
    "aspects": ("aspects", "sentiment"),
    "sentiment": ("sentiment", "sentiment"),
    "spam": ("spam", "spam"),
    "spam-again": ("spam", "spam"),
    "topic": ("topic", "spam"),
}

# Where a second sentence begins, of those who write capitals.
_ANOTHER = re.compile(r"[.!?]['\")]* +[A-Z]")


def write_stores(folder: Path) -> None:
    """Write `tasks` and `two-labels`, stores of five tasks of the same names."""
    for task, (own, of_two) in TASKS.items():
        shutil.copytree(STORE / own, folder / "tasks" / task)
        shutil.copytree(STORE / of_two, folder / "two-labels" / task)


def texts_of(example: str) -> list[str]:
    """All of an example's texts that are one sentence, in one fixed random order."""
    paths = sorted((ROOT / "examples" / "data").glob(f"{example}.*.jsonl"))
    lines = [line for path in paths for line in path.read_text("utf-8").splitlines()]
    random.Random(0).shuffle(lines)
    texts = [json.loads(line)["text"] for line in lines]
    return [text for text in texts if not _ANOTHER.search(text)]


def asked() -> list[tuple[str, str]]:
    """(task, text), every task as often as any other, in one fixed random order."""
    found = []
    for task, (example, _) in TASKS.items():
        texts = texts_of(example)
        # Two tasks of one example have a half of its sentences each.
        sharing = [other for other, (own, _) in TASKS.items() if own == example]
        found.append([(task, t) for t in texts[sharing.index(task) :: len(sharing)]])
    fewest = min(map(len, found))
    pairs = [pair for each in found for pair in each[:fewest]]
    random.Random(0).shuffle(pairs)
    return pairs


def ours(pairs: Sequence[tuple[str, str]], prefix: str = "") -> Iterator[bytes]:
    """Our route, over and over."""
    return cycle([of_ours(task, [text], prefix) for task, text in pairs])


def of_ours(task: str, texts: Sequence[str], prefix: str = "") -> bytes:
    return post(f"{prefix}/v1/tasks/{task}/predict", json.dumps({"texts": texts}).encode())


def guide(pairs: Sequence[tuple[str, str]]) -> Iterator[bytes]:
    """The guide's route: whatever the task, it is the one that it has."""
    return cycle([post("/predict", json.dumps({"texts": [text]}).encode()) for _, text in pairs])


def idiom(pairs: Sequence[tuple[str, str]]) -> Iterator[bytes]:
    """The idiom's route, with the task where Serve looks for it."""
    return cycle(
        [
            post(
                "/", json.dumps({"text": text}).encode(), f"serve_multiplexed_model_id: {task}\r\n"
            )
            for task, text in pairs
        ]
    )
