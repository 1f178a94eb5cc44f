"""The Ray Serve deployment on the device: adapters in and out of slots, rows through the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import ray
import torch

from adapters.errors import AdapterChanged, AdapterError, AdapterRefused
from adapters.failures import Failures
from adapters.host import Host
from adapters.pinned import Pinned
from adapters.rules import ProblemType
from adapters.slots import Slots
from adapters.store import open_store
from deployments.config import GIB, Args
from deployments.errors import BatchLoopDied
from deployments.model.budget import Budget
from deployments.model.dynamic_batch import batch_queue, dynamic_batch
from deployments.model.engine import BadRow, EmptySlot, Engine, Loaded
from deployments.model.facts import to_facts
from deployments.model.memory import take_stock
from deployments.model.planner import Planner
from deployments.model.threads import forward_threads
from deployments.model.vocabulary import export_vocabulary, to_pages
from deployments.rows import Facts, Prediction, Row, Tokens

logger = logging.getLogger("ray.serve")
T = TypeVar("T")
Rest = Callable[[float], Awaitable[None]]
# At a time: a load is mostly Python, and each more that runs keeps forward and event loop waiting.
_LOADS = 2
# Of the time while rows are answered, how much prefetching may take.
_PREFETCH_SHARE = 0.1


class Model:
    """One base on one device, its resident adapters, and the queue of rows before it.

    The event loop owns queue, slots and host cache; one thread owns all work on the device.
    """

    _device_lost = False

    async def __init__(self, args: Args) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        """Load the base; the replica takes traffic when this returns."""
        threads = forward_threads(args, _num_nodes())
        # Thread counts are a thread's own, and Ray would leave this one a single core.
        self._device = ThreadPoolExecutor(1, "forward", torch.set_num_threads, (threads,))
        self._loads = ThreadPoolExecutor(_LOADS, "load")
        self.store = open_store(args.adapter_store)
        self.failures = Failures()
        self._num_calls = 0
        self.engine = await self._on_device(_make_engine, args)
        vocabulary = export_vocabulary(self.engine.encoder)
        self._max_length = vocabulary["max_length"]
        self._pages = to_pages(vocabulary)
        self.planner = make_planner(args, self.engine.device)
        host_bytes = int(args.max_host_gib * GIB)
        memory = take_stock(self.engine.encoder, self.planner.most_tokens, host_bytes)
        memory.check()
        self.host: Host[Loaded] = Host(host_bytes, lambda item: item.num_bytes)
        self.slots: Slots[Loaded] = Slots(
            num_pages=self.engine.encoder.bank.num_pages,
            max_slots=None if args.adapter_slots == "auto" else args.adapter_slots,
            fetch=self._fetch,
            size=lambda item: item.num_pages,
            write=self._write,
        )
        self.pinned = Pinned(args.pinned_tasks, self.slots, self._find)
        await self.pinned.load()
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
        loaded = await self._read(task)
        self.host.put(f"{task}@{loaded.artifact.version}", loaded)
        return to_facts(loaded.artifact, self._max_length)

    async def prefetch(self, tasks: Collection[str]) -> None:
        """Bring tasks into host RAM, one after the other, so that other loads need not wait.

        While rows are answered it takes a share of the time only. A task that cannot be served is
        left for its first request to say so.
        """
        for task in tasks:
            with contextlib.suppress(AdapterError):
                loaded = await self._read(task, rest=self._rest)
                self.host.put(f"{task}@{loaded.artifact.version}", loaded)

    async def _rest(self, taken_s: float) -> None:
        """Leave the interpreter to the rows that are answered, after so long a piece of work."""
        if self._num_calls:
            await asyncio.sleep(taken_s * (1 / _PREFETCH_SHARE - 1))

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
            BatchLoopDied: This replica cannot answer, and is about to be replaced.
        """
        self._num_calls += 1
        try:
            async with self.slots.pin(f"{task}@{version}") as slot:
                await self.pinned.follow(task, f"{task}@{version}")
                rows = [Row(slot, Tokens(*given), problem_type) for given in inputs]
                answers = await asyncio.gather(
                    *(self.answer(row) for row in rows), return_exceptions=True
                )
        finally:
            self._num_calls -= 1
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

    async def _find(self, task: str) -> str:
        """Bring a task's current version into host RAM and return its name."""
        return f"{task}@{(await self.describe(task))['version']}"

    async def _read(
        self, task: str, version: str | None = None, rest: Rest | None = None
    ) -> Loaded:
        """Read and validate a folder off the event loop, so that other rows keep flowing.

        What failed fails again at once, as long as the folder is as it was. `rest` is awaited after
        each piece of the work with the seconds that it took.
        """
        look = await self._off_loop(self.store.look, task)
        with self.failures.remembering(f"{task}@{version or ''}", look):
            try:
                files = await self._piece(rest, self.store.read, task)
                if version is not None and files.version != version:
                    raise AdapterChanged(task, version, files.version)
                artifact = await self._piece(rest, self.engine.validate, files)
                return await self._piece(rest, self.engine.pack, artifact)
            except AdapterRefused as error:
                logger.warning("adapter=%s refused: %s", task, "; ".join(error.problems))
                raise

    async def _piece(self, rest: Rest | None, work: Callable[..., T], *args: Any) -> T:
        started_s = time.perf_counter()
        result = await self._off_loop(work, *args)
        if rest is not None:
            await rest(time.perf_counter() - started_s)
        return result

    async def _fetch(self, name: str) -> Loaded:
        """Return `task@version` from the host's RAM, or read it."""
        task, _, version = name.partition("@")
        return await self.host.get(name, lambda: self._read(task, version))

    async def _write(self, slot: int, loaded: Loaded, gone: Sequence[int]) -> None:
        """Hand an adapter over to a slot, after those that leave.

        It is not waited for. The one thread works in order, so every forward handed over from now
        on finds it there, and its rows join the next batch instead of the one after.
        """
        started_s = time.perf_counter()
        name = f"{loaded.artifact.task}@{loaded.artifact.version}"

        def written(writing: asyncio.Future[None]) -> None:
            if writing.cancelled():
                return
            if writing.exception() is not None:
                # The slot is empty now: rows for it fail, and none is answered by another adapter.
                self._device_lost = True
                logger.error("adapter=%s was not written", name, exc_info=writing.exception())
                return
            taken_ms = 1e3 * (time.perf_counter() - started_s)
            size = loaded.num_bytes
            logger.info("adapter=%s to=slot:%d bytes=%d ms=%.1f", name, slot, size, taken_ms)
            if gone:
                logger.info("left=slot:%s", ",".join(map(str, gone)))

        loop = asyncio.get_running_loop()
        writing = loop.run_in_executor(self._device, self.engine.write, slot, loaded, gone)
        writing.add_done_callback(written)

    async def _off_loop(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._loads, work, *args)

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


def _num_nodes() -> int:
    """Return how many nodes replicas are spread over; without Ray this process is on the one."""
    if not ray.is_initialized():
        return 1
    return sum(node["Alive"] and node["Resources"].get("CPU", 0) >= 1 for node in ray.nodes())


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
    if isinstance(answer, EmptySlot):  # not the caller's fault, and another replica can answer
        raise BatchLoopDied(str(answer)) from answer
    if isinstance(answer, BadRow):
        return str(answer)
    if isinstance(answer, BatchLoopDied) or not isinstance(answer, Exception):
        raise answer
    logger.error("an input could not be answered", exc_info=answer)
    return "this input could not be answered; the server's log says why"
