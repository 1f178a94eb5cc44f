"""The Ray Serve deployment on the device: adapters in and out of slots, rows through the engine."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import torch

from adapters.errors import AdapterChanged, AdapterRefused
from adapters.host import Host
from adapters.rules import ProblemType
from adapters.slots import Slots
from adapters.store import Store
from deployments.config import GIB, Args
from deployments.errors import BatchLoopDied
from deployments.model.budget import Budget
from deployments.model.dynamic_batch import batch_queue, dynamic_batch
from deployments.model.engine import BadRow, Engine, Loaded
from deployments.model.facts import to_facts
from deployments.model.memory import take_stock
from deployments.model.planner import Planner
from deployments.model.vocabulary import export_vocabulary, to_pages
from deployments.rows import Facts, Prediction, Row, Tokens

logger = logging.getLogger("ray.serve")
T = TypeVar("T")


class Model:
    """One base on one device, its resident adapters, and the queue of rows before it.

    The event loop owns queue, slots and host cache; one thread owns all work on the device.
    """

    _device_lost = False

    async def __init__(self, args: Args) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        """Load the base; the replica takes traffic when this returns."""
        threads = args.num_cpus or len(os.sched_getaffinity(0))
        # Thread counts are a thread's own, and Ray would leave this one a single core.
        self._device = ThreadPoolExecutor(1, "forward", torch.set_num_threads, (threads,))
        self.store = Store(args.adapter_store)
        self.engine = await self._on_device(_make_engine, args)
        vocabulary = export_vocabulary(self.engine.encoder)
        self._max_length = vocabulary["max_length"]
        self._pages = to_pages(vocabulary)
        self.planner = make_planner(args, self.engine.device)
        host_bytes = int(args.max_host_gib * GIB)
        memory = take_stock(self.engine.encoder, self.planner.max_tokens, host_bytes)
        memory.check()
        self.host: Host[Loaded] = Host(host_bytes, lambda item: item.num_bytes)
        self.slots: Slots[Loaded] = Slots(
            num_pages=self.engine.encoder.bank.num_pages,
            max_slots=None if args.adapter_slots == "auto" else args.adapter_slots,
            fetch=self._fetch,
            size=lambda item: item.num_pages,
            write=self._write,
        )
        logger.info(
            "base=%s quantization=%s device=%s threads=%d memory: %s",
            args.base_model,
            self.engine.quantization,
            self.engine.device,
            threads,
            memory,
        )

    async def vocabulary_page(self, page: int) -> bytes:
        """Return a page of the tokenizer (`deployments.model.vocabulary`), empty past the last."""
        return self._pages[page] if page < len(self._pages) else b""

    async def describe(self, task: str) -> Facts:
        """Read a task's folder as it is now, validate it whole, and keep it in RAM.

        Raises:
            AdapterError: The task is not there, not complete, or refused with all its problems.
        """
        try:
            loaded = await self._read(task)
        except AdapterRefused as error:
            logger.warning("adapter=%s refused: %s", task, "; ".join(error.problems))
            raise
        self.host.put(f"{task}@{loaded.artifact.version}", loaded)
        return to_facts(loaded.artifact, self._max_length)

    async def predict(
        self,
        task: str,
        version: str,
        problem_type: ProblemType,
        inputs: list[tuple[list[int], list[int] | None]],
    ) -> list[list[float] | list[list[float]] | str]:
        """Answer inputs of one task.

        Args:
            task: The task.
            version: The version that must answer; no other will.
            problem_type: How its logits become scores.
            inputs: (ids, type ids) of each input, see `deployments.rows.Tokens`.

        Returns:
            For each input its scores, one a label, of a token classifier a list of them for each
            token; or a sentence where it alone failed.

        Raises:
            AdapterError: The version cannot be had.
            BatchLoopDied: This replica can answer nothing any more.
        """
        async with self.slots.pin(f"{task}@{version}") as slot:
            rows = [Row(slot, Tokens(*given), problem_type) for given in inputs]
            answers = await asyncio.gather(
                *(self.answer(row) for row in rows), return_exceptions=True
            )
        return [_as_data(answer) for answer in answers]

    @dynamic_batch
    async def answer(self, rows: list[Row]) -> list[Prediction | Exception]:
        """Answer one row; what reaches the body is the batch that it went through in."""
        try:
            answers, seconds = await self._on_device(_timed, self.engine.predict, rows)
        except torch.AcceleratorError:
            self._device_lost = True  # after an illegal access no kernel runs any more
            raise
        ran = zip(rows, answers, strict=True)
        self.planner.note(
            [row.num_tokens for row, answer in ran if not isinstance(answer, BadRow)], seconds
        )
        return answers

    async def check_health(self) -> None:
        """Raise if no row can be answered any more, so that Serve replaces this replica."""
        if self._device_lost:
            raise RuntimeError("the device does not answer any more")
        queue = batch_queue(self.answer)
        if queue is not None and not queue.alive:
            raise RuntimeError("the batch loop has ended")

    async def _read(self, task: str, version: str | None = None) -> Loaded:
        """Read and validate a folder off the event loop, so that other rows keep flowing."""
        files = await asyncio.to_thread(self.store.read, task)
        if version is not None and files.version != version:
            raise AdapterChanged(task, version, files.version)
        return await asyncio.to_thread(self.engine.read, files)

    async def _fetch(self, name: str) -> Loaded:
        """Return `task@version` from the host's RAM, or read it."""
        task, _, version = name.partition("@")
        return await self.host.get(name, lambda: self._read(task, version))

    async def _write(self, slot: int, loaded: Loaded, gone: Sequence[int]) -> None:
        """Put an adapter into a slot, after those that leave."""
        started_s = time.perf_counter()
        await self._on_device(self.engine.write, slot, loaded, gone)
        logger.info(
            "adapter=%s@%s to=slot:%d bytes=%d ms=%.1f",
            loaded.artifact.task,
            loaded.artifact.version,
            slot,
            loaded.num_bytes,
            1e3 * (time.perf_counter() - started_s),
        )
        if gone:
            logger.info("left=slot:%s", ",".join(map(str, gone)))

    async def _on_device(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._device, work, *args)


def make_planner(args: Args, device: torch.device) -> Budget:
    """Return the planner for a device.

    On a CPU more than about a thousand tokens leave its caches and take longer a token, and a
    forward has little fixed cost: less padding is better (benchmarks/padding.py).
    """
    on_cpu = device.type == "cpu"
    tokens = args.max_batch_tokens
    if tokens == "auto":
        tokens = 1024 if on_cpu else 16384
    planner = Planner(args.max_batch_rows, tokens)
    if on_cpu:
        planner = replace(planner, max_stretch=1.25, short_tokens=8)
    return Budget(planner)


def _timed(
    predict: Callable[[list[Row]], list[Prediction | Exception]], rows: list[Row]
) -> tuple[list[Prediction | Exception], float]:
    """Answer rows, and say in how many seconds: on the device's thread, so that no wait counts."""
    started_s = time.perf_counter()
    answers = predict(rows)
    return answers, time.perf_counter() - started_s


def _make_engine(args: Args) -> Engine:
    return Engine(
        args.base_model,
        quantization=args.quantization,
        device=args.device,
        bank_bytes=int(args.bank_gib * GIB),
        base_aliases=args.base_aliases,
    )


def _as_data(answer: Prediction | BaseException) -> list[float] | list[list[float]] | str:
    """Return a row's scores, or a sentence where it alone failed."""
    if isinstance(answer, Prediction):
        return answer.scores
    if isinstance(answer, BadRow):
        return str(answer)
    if isinstance(answer, BatchLoopDied) or not isinstance(answer, Exception):
        raise answer
    logger.error("an input could not be answered", exc_info=answer)
    return "this input could not be answered; the server's log says why"
