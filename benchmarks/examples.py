"""The example tasks on the example base: real adapters, and sentences that people could write."""

from __future__ import annotations

import json
import random

from adapters.directory import Directory
from benchmarks.bases import ROOT
from deployments.config import Args
from deployments.model.budget import Budget, limits
from deployments.model.engine import Engine
from deployments.model.vocabulary import export_vocabulary
from deployments.rows import Row
from deployments.tokens import Tokenizer

BASE = str(ROOT / "examples" / "base")
STORE_FOLDER = str(ROOT / "examples" / "store")
STORE = Directory(STORE_FOLDER)
MAX_LENGTH = 128  # as the adapters were trained


def example_engine(quantization: str) -> Engine:
    """An engine with the four example adapters in slots 1 to 4, by name."""
    engine = Engine(BASE, quantization=quantization, device="cpu")
    for slot, task in enumerate(STORE.tasks(), start=1):
        engine.write(slot, engine.read(STORE.read(task)))
    return engine


def example_planner() -> Budget:
    """The server's, as its defaults make it on a CPU."""
    args = Args(base_model=BASE, adapter_store=STORE_FOLDER)
    return Budget(limits(args, on_cpu=True, padded=False))


def example_tokenizer(engine: Engine) -> Tokenizer:
    return Tokenizer(export_vocabulary(engine.encoder))


def example_texts() -> list[tuple[int, str]]:
    """(slot, text) of all tasks' sentences, training and held out, in one fixed random order."""
    found = []
    for slot, task in enumerate(STORE.tasks(), start=1):
        for part in ("train", "heldout"):
            lines = (ROOT / "examples" / "data" / f"{task}.{part}.jsonl").read_text("utf-8")
            found += [(slot, json.loads(line)["text"]) for line in lines.splitlines()]
    random.Random(0).shuffle(found)
    return found


def example_rows(tokenizer: Tokenizer) -> list[Row]:
    slots, texts = zip(*example_texts(), strict=True)
    encoded = tokenizer.encode(texts, MAX_LENGTH)
    return [Row(slot, one.tokens) for slot, one in zip(slots, encoded, strict=True)]
