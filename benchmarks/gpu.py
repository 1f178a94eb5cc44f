"""What does a GPU give? `make bench-gpu`: mixed batches, their peers, memory and slot writes.

BERT-base and a decoder of about a billion parameters, random weights, in bf16, int8 and nf4; 64
rows of 128 tokens, each row of another of k resident adapters (q,v r=8). Speeds are shares of the
plain base's: transformers' model with one head, its linears quantised as ours are, as are the
merged model's. PEFT has 32 adapters over the base in bf16. So has vLLM, and TEI has 32 merged
models, where they are installed (gpu_peers.py). A slot write is what the GPU sees, from the call
until a forward may read the slot. The weights in nf4 and bf16 are of a decoder of 7B.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
)
from transformers.utils import logging

from adapters.directory import Directory
from benchmarks.bases import with_adapters
from benchmarks.gpu_peers import Job, beside, not_run_lines
from benchmarks.peers.merged import answer_alone, merged_model
from benchmarks.peers.peft_model import answer_mixed
from benchmarks.record import save, setup, table
from benchmarks.timing import in_turns, ratio
from deployments.config import GIB
from deployments.model.encoder import default_dtype
from deployments.model.engine import Engine, Loaded
from deployments.model.quantize import Quantization, quantize
from deployments.rows import Row, Tokens

HEADS = {"classifier", "score"}
Work = Callable[[], object]


@dataclass(frozen=True)
class Base:
    """A base to measure on, and the modules that its adapters change."""

    name: str
    config: PretrainedConfig
    targets: tuple[str, str]
    bank_bytes: int


def llama(name: str, hidden: int, layers: int, heads: int, wide: int, bank_bytes: int) -> Base:
    """A decoder of Llama's kind; a quarter of its heads have keys and values of their own."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        intermediate_size=wide,
        pad_token_id=0,
    )
    return Base(name, config, ("q_proj", "v_proj"), bank_bytes)


@dataclass(frozen=True)
class Sizes:
    """How much is measured; a test takes less."""

    bases: tuple[Base, ...] = (
        Base("BERT-base", BertConfig(), ("query", "value"), 2 * GIB),
        llama("Llama 1B", 2048, 22, 32, 5632, 6 * GIB),
    )
    weighed: Base = field(default_factory=lambda: llama("Llama 7B", 4096, 36, 32, 12288, 0))
    quantizations: tuple[Quantization, ...] = ("none", "int8", "nf4")
    num_rows: int = 64
    num_tokens: int = 128
    counts: tuple[int, ...] = (1, 32, 256, 1000)
    num_different: int = 32  # PEFT's adapters, and what the resident ones are copies of
    rounds: int = 10
    warm: int = 12  # more than it takes until a CUDA graph is recorded


def main() -> None:
    """Measure, save and print; exit with a sentence where there is no GPU."""
    if not torch.cuda.is_available():
        sys.exit("bench-gpu needs a CUDA device and torch sees none; `make bench` measures CPUs")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    said, rows = setup(("bitsandbytes",)), []
    for row in measure(torch.device("cuda"), Sizes()):
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    save("gpu", rows, said)
    print(as_table(rows))


def measure(device: torch.device, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Every base and quantisation; then the weights alone of a large one."""
    for base in sizes.bases:
        with tempfile.TemporaryDirectory() as folder:
            _random_model(base, device).save_pretrained(f"{folder}/base")
            peft = with_adapters(
                f"{folder}/base",
                {"target_modules": [*base.targets], "r": 8},
                sizes.num_different,
            )
            store = Path(folder) / "store"
            for name in peft.peft_config:
                peft.save_pretrained(str(store / "_"), selected_adapters=[name])
                (store / "_" / name).rename(store / name)
            for quantization in sizes.quantizations:
                yield _compare(base, quantization, peft, Path(folder), device, sizes)
                _free()
    yield _weigh(sizes.weighed, device)


def _random_model(base: Base, device: torch.device) -> Any:
    torch.manual_seed(0)
    with device:
        return AutoModel.from_config(base.config, dtype=default_dtype(device)).eval()


def _compare(
    base: Base,
    quantization: Quantization,
    peft: Any,
    folder: Path,
    device: torch.device,
    sizes: Sizes,
) -> dict[str, Any]:
    dice = torch.Generator().manual_seed(0)
    shape = (sizes.num_rows, sizes.num_tokens)
    ids = torch.randint(5, base.config.vocab_size, shape, generator=dice)
    engine = Engine(
        f"{folder}/base",
        quantization=quantization,
        device=device.type,
        bank_bytes=base.bank_bytes,
    )
    loaded = [
        engine.read(Directory(folder / "store").read(f"a{index}"))
        for index in range(sizes.num_different)
    ]
    for slot in range(1, 1 + max(sizes.counts)):
        engine.write(slot, loaded[slot % len(loaded)])
    works = _ours(engine, ids, sizes) | _alone(folder, quantization, ids.to(device))
    if quantization == "none":
        works |= _mixed_by_peft(peft.to(device, default_dtype(device)), ids.to(device))
    works = {name: _synchronised(work, device) for name, work in works.items()}
    for work in works.values():
        for _ in range(sizes.warm):
            work()
    taken = in_turns(works, sizes.rounds)
    row = {
        "base": base.name,
        "quantization": quantization,
        "median_ms": {name: 1e3 * statistics.median(runs) for name, runs in taken.items()},
        "of_plain": {name: ratio(taken, "plain", name) for name in taken if name != "plain"},
        "slot_write_us": slot_write_us(engine, loaded, sizes.rounds),
        "adapter_bytes": loaded[0].num_bytes,
    }
    if quantization == "none":
        adapters = [folder / "store" / f"a{index}" for index in range(sizes.num_different)]
        job = Job(f"{folder}/base", adapters, ids, default_dtype(device))
        _add_peers(row, works["plain"], job, sizes)
    return row


def _add_peers(row: dict[str, Any], plain: Work, job: Job, sizes: Sizes) -> None:
    """Add vLLM and TEI, or why they were not run."""
    taken, row["peers"], row["not_run"] = beside(plain, job, sizes.rounds, sizes.warm)
    for name, runs in taken.items():
        row["median_ms"][name] = 1e3 * statistics.median(runs[name])
        row["of_plain"][name] = ratio(runs, "plain", name)


def _ours(engine: Engine, ids: torch.Tensor, sizes: Sizes) -> dict[str, Work]:
    """Batches of k resident adapters; as few of them as there are rows, spread over all."""
    works: dict[str, Work] = {}
    for count in sizes.counts:
        slots = [1 + index * max(1, count // len(ids)) % count for index in range(len(ids))]
        rows = [Row(slot, Tokens(own)) for slot, own in zip(slots, ids.tolist(), strict=True)]
        works[f"k={count}"] = lambda rows=rows: _run(engine, rows)
    return works


def _run(engine: Engine, rows: list[Row]) -> torch.Tensor:
    with torch.inference_mode():
        return engine.logits(rows)


def _alone(folder: Path, quantization: Quantization, ids: torch.Tensor) -> dict[str, Work]:
    """The plain base, and a merged model."""
    base, dtype = f"{folder}/base", default_dtype(ids.device)
    models = {
        "plain": AutoModelForSequenceClassification.from_pretrained(base, num_labels=2),
        "merged": merged_model(base, f"{folder}/store/a0"),
    }
    works: dict[str, Work] = {}
    for name, model in models.items():
        model.to(dtype).eval()
        quantize(model, HEADS, quantization, ids.device)
        model.to(ids.device)
        works[name] = lambda model=model: answer_alone(model, ids)
    return works


def _mixed_by_peft(peft: Any, ids: torch.Tensor) -> dict[str, Work]:
    known = list(peft.peft_config)
    names = [known[index % len(known)] for index in range(len(ids))]
    mask = torch.ones_like(ids)
    return {"PEFT mixed": lambda: answer_mixed(peft, ids, mask, names)}


def _synchronised(work: Work, device: torch.device) -> Work:
    """Let a work end when the device has ended it."""

    def run() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def slot_write_us(engine: Engine, loaded: Sequence[Loaded], rounds: int) -> float:
    """Return the median µs until a slot that is written may be read; by events on a GPU."""
    taken = []
    for index in range(rounds):
        clock = _cuda_clock if engine.device.type == "cuda" else _cpu_clock
        stop = clock()
        engine.write(1, loaded[index % len(loaded)])
        engine.encoder.bank.route([1])
        taken.append(1e6 * stop())
    return statistics.median(taken)


def _cpu_clock() -> Callable[[], float]:
    started = time.perf_counter()
    return lambda: time.perf_counter() - started


def _cuda_clock() -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()

    def stop() -> float:
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return stop


def _weigh(base: Base, device: torch.device) -> dict[str, Any]:
    """The bytes of a base's weights as it is made, and in nf4, no bank among them."""
    others = _allocated(device)
    model = _random_model(base, device)
    plain = _weights(model, device) - others
    quantize(model, HEADS, "nf4", device)
    _free()
    nf4 = _weights(model, device) - others
    return {"base": base.name, "weights_gib": plain / GIB, "nf4_gib": nf4 / GIB, "nf4": nf4 / plain}


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _weights(model: torch.nn.Module, device: torch.device) -> int:
    """Return all that is allocated on a GPU; on a CPU, where nobody counts, a model's tensors."""
    if device.type == "cuda":
        return _allocated(device)
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a base and quantisation, one for the weights, one a peer not run."""
    speeds = list(dict.fromkeys(name for row in rows for name in row.get("of_plain", ())))
    columns = ["base", "in", "plain ms", *speeds, "slot write µs", "weights, nf4 of bf16"]
    lines = []
    for row in rows:
        if "nf4" in row:
            weights = f"{row['nf4_gib']:.2f} of {row['weights_gib']:.2f} GiB: {row['nf4']:.2f}"
            lines.append([row["base"], *["–"] * (len(columns) - 2), weights])
            continue
        shares = [row["of_plain"].get(name) for name in speeds]
        lines.append(
            [
                row["base"],
                "bf16" if row["quantization"] == "none" else row["quantization"],
                f"{row['median_ms']['plain']:.2f}",
                *("–" if share is None else f"{share:.2f}" for share in shares),
                f"{row['slot_write_us']:.0f}",
                "–",
            ]
        )
    return table(columns, lines + not_run_lines(rows, len(columns)))


if __name__ == "__main__":
    main()
