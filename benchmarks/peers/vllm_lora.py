"""vLLM: a sequence classifier with LoRA adapters, offline, each row with an adapter of its own.

As docs/features/lora.md ("Sequence-Classification LoRA Adapters") and its example
examples/pooling/classify/classification_with_lora_offline.py have it: `LLM(runner="pooling",
enable_lora=True)`, then `classify` with a `LoRARequest` a prompt. All adapters fit at once
(`max_loras`). Two of its defaults are changed: it takes a share of the GPU and not nearly all of
it, and does not keep prefixes of prompts, which are the same in each round. It lives in a process
of its own, so that what it holds of the GPU is given back.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.peers import NotRun

OLDEST = (0, 31)  # reads the head that an adapter brings
GPU_SHARE = 0.3
MAX_TOKENS = 512  # of a prompt
START_S = 300
ANSWER_S = 60


def find() -> str:
    """Return the version that is installed.

    Raises:
        NotRun: There is none, or it is too old.
    """
    try:
        found = version("vllm") if find_spec("vllm") else None
    except PackageNotFoundError:
        found = None
    if found is None:
        raise NotRun("the package vllm is not installed")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        raise NotRun(f"vllm {found} reads no heads of adapters, 0.31 and newer do")
    return found


@contextmanager
def classifier(
    base: str, adapters: Sequence[Path], ids: Sequence[Sequence[int]], of: Sequence[int]
) -> Iterator[Callable[[], list[list[float]]]]:
    """Give what answers all rows once, [rows, labels], as probabilities.

    Args:
        base: Folder of a sequence classifier with a tokenizer.
        adapters: Folders, as PEFT saves them.
        ids: Token ids of each row.
        of: Which of the adapters answers it.

    Raises:
        RuntimeError: vLLM refuses something, in its words, or is silent.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    given = (theirs, base, [str(path) for path in adapters], [list(row) for row in ids], [*of])
    process = context.Process(target=_work, args=given)
    process.start()
    theirs.close()

    def received(within_s: float) -> Any:
        # Its engine may outlive the process, and then the pipe has no end.
        until = time.monotonic() + within_s
        while not ours.poll(0.5):
            if not process.is_alive() or time.monotonic() > until:
                raise RuntimeError("vLLM's process ended or hangs")
        try:
            is_good, said = ours.recv()
        except EOFError:
            raise RuntimeError("vLLM's process ended") from None
        if not is_good:
            raise RuntimeError(said)
        return said

    def answer() -> list[list[float]]:
        ours.send(None)
        answers: list[list[float]] = received(ANSWER_S)
        return answers

    try:
        received(START_S)
        yield answer
    finally:
        ours.close()
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()


def _work(
    pipe: Connection, base: str, adapters: list[str], ids: list[list[int]], of: list[int]
) -> None:
    """Answer the rows whenever asked, in a process of its own, until the other end is closed."""
    try:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        llm = LLM(
            model=base,
            runner="pooling",
            enable_lora=True,
            max_loras=len(adapters),
            max_lora_rank=8,
            max_model_len=MAX_TOKENS,
            gpu_memory_utilization=GPU_SHARE,
            enable_prefix_caching=False,
        )
        requests = [
            LoRARequest(Path(path).name, number, path)
            for number, path in enumerate(adapters, start=1)
        ]
        prompts = [{"prompt_token_ids": row} for row in ids]
        pipe.send((True, None))
        while True:
            pipe.recv()
            outputs = llm.classify(
                prompts, lora_request=[requests[index] for index in of], use_tqdm=False
            )
            pipe.send((True, [list(output.outputs.probs) for output in outputs]))
    except EOFError:
        return
    except Exception as error:
        pipe.send((False, f"{type(error).__name__}: {error}"))
