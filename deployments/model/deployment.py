"""The Ray Serve deployment on the device: rows of any adapters through one base."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from adapters.documents import open_documents
from adapters.rules import ProblemType
from deployments.config import Args, ConfigError
from deployments.errors import BatchLoopDied
from deployments.frames import Address
from deployments.journal import Journal
from deployments.model.answers import as_data
from deployments.model.budget import Budget, limits
from deployments.model.dynamic_batch import batch_queue, dynamic_batch, enter
from deployments.model.engine import BadRow, make_engine
from deployments.model.exchange import Exchange, Ways
from deployments.model.facts import to_facts
from deployments.model.fitting import DoesNotFit
from deployments.model.handles import catalog_poll, hot_on_peers, num_nodes, own_host, replica_name
from deployments.model.health import Health
from deployments.model.listener import Listener
from deployments.model.memory import take_stock
from deployments.model.news import News
from deployments.model.residents import Residents
from deployments.model.scores import NoNumber
from deployments.model.slot_writes import SlotWrites
from deployments.model.threads import forward_thread, forward_threads, timed
from deployments.model.vocabulary import export_vocabulary, to_pages
from deployments.model.warmup import bring, warm_up
from deployments.room import Room
from deployments.rows import Answer, Facts, Parcel, Prediction, Reply, Residency, Row, Tokens
from deployments.scaling import ANSWERED, QUEUED, SPEED
from deployments.settings import MODEL_KEYS, laid_over
from deployments.snapshot import Snapshot
from deployments.watch import Watch

logger = logging.getLogger("ray.serve")
T = TypeVar("T")
# Versions of its peers that a replica brings into its slots before it takes traffic.
_MOST_HOT = 256
# How long they may take together, and how long its first forwards; then Serve starts another one.
_BRING_S, _FIRST_S = 20.0, 120.0


class Model:
    """One base on one device, its resident adapters, and the queue of rows before it.

    The event loop owns queue and residents; one thread owns all work on the device.
    """

    async def __init__(self, args: Args) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        """Load the base; the replica takes traffic when this returns."""
        self._args = args
        self.health = Health(end=lambda: os._exit(1))
        threads = forward_threads(args, num_nodes())
        self._device = forward_thread(threads, on_cpu=args.device == "cpu")
        self.engine = await self._on_device(make_engine, args)
        await self._check_base()
        if self.health.problem is not None:
            raise RuntimeError(f"{self.health.problem}; is its file whole?")
        vocabulary = export_vocabulary(self.engine.encoder)
        self._max_length = vocabulary["max_length"]
        self._pages = to_pages(vocabulary)
        on_cpu, padded = self.engine.device.type == "cpu", not self.engine.encoder.is_ragged
        self._limits = partial(limits, on_cpu=on_cpu, padded=padded)
        self.planner = Budget(self._limits(args))
        self._memory = take_stock(
            self.engine.encoder, self.planner.most_tokens, args.max_host_bytes
        )
        self._memory.check()
        self._news = News()
        writes = SlotWrites(self.engine, self._device, self._news, self.health)
        self.residents = Residents(
            self.engine,
            args.open_store(),
            host_bytes=args.max_host_bytes,
            max_slots=args.max_slots,
            pinned_tasks=args.pinned_tasks,
            write=writes.write,
            forget=writes.forget,
        )
        enter_row = partial(enter, self.answer)
        ways = Ways(self.residents.pin, enter_row, as_data, self.planner.promise)
        self._exchange = Exchange(replica_name(), ways, self._news, Room(args.max_rows_on_the_way))
        self._listener = Listener(self._exchange.call)
        await self._listener.start(own_host())
        self.__del__ = self._listener.close  # Serve's; of the class it would be Python's too
        await self._follow_catalog(args)
        await self.residents.load_pinned()
        await bring(self.residents, await hot_on_peers(), _BRING_S)
        slots = [*self.residents.slots.resident.values()]
        try:
            async with asyncio.timeout(_FIRST_S):
                await self._on_device(warm_up, self.engine, self.planner, slots, self._max_length)
        except TimeoutError:
            raise RuntimeError(f"the first forwards have not ended in {_FIRST_S:.0f} s") from None
        logger.info(
            "base=%s quantization=%s device=%s threads=%d memory: %s",
            args.base_model,
            self.engine.quantization,
            self.engine.device,
            threads,
            self._memory,
        )

    async def reconfigure(self, user_config: Any) -> None:
        """Take what a Serve YAML changes in place; what is wrong changes nothing and is logged.

        Raising would cost this replica, and the next one, which would be told the same.
        """
        try:
            args = laid_over(self._args, user_config, MODEL_KEYS)
            planner = self._limits(args)
            self._memory.given(self.engine.encoder, planner.max_tokens, args.max_host_bytes).check()
        except ConfigError as error:
            logger.error("user_config of Model is refused, and nothing changes: %s", error)
            return
        self.planner.limit(planner)
        self.residents.host.resize(args.max_host_bytes)
        self.residents.slots.resize(args.max_slots)

    async def vocabulary_page(self, page: int) -> bytes:
        """Return a page of the tokenizer (`deployments.model.vocabulary`), empty past the last."""
        return self._pages[page] if page < len(self._pages) else b""

    async def describe(
        self, task: str, version: str | None = None, rules: dict[str, Any] | None = None
    ) -> Facts:
        """Read an adapter as it is now, validate it whole, and keep it in RAM.

        Args:
            task: The task.
            version: The version; None for what its plain folder holds.
            rules: Laid over its own.

        Raises:
            AdapterError: It is not there, not complete, or refused with all its problems.
        """
        return to_facts(await self.residents.describe(task, version, rules), self._max_length)

    async def check(
        self, task: str, staging: str | None, rules: dict[str, Any] | None = None
    ) -> Facts:
        """Validate what was staged exactly as a load would, and keep nothing of it.

        Args:
            task: The task that it is for.
            staging: See `adapters.store.Store.stage`; None for the task's plain folder.
            rules: Laid over its own.

        Raises:
            AdapterError: It is not there, or refused with all its problems.
        """
        artifact = await self.residents.reader.check(task, staging, rules or {})
        return to_facts(artifact, self._max_length)

    async def warm(self, task: str, *versions: str) -> None:
        """Bring versions of a task into slots of this replica; see `Residents.warm`."""
        await self.residents.warm(task, *versions)

    async def hot(self) -> list[str]:
        """Return what a replica that starts should have too; see `Residents.hot`."""
        return self.residents.hot(_MOST_HOT)

    async def forget(self, task: str, version: str) -> None:
        """Let go of a version that came to nothing: slot, RAM and disk cache."""
        await self.residents.forget(task, version)

    async def residency(self, after: str, limit: int) -> dict[str, Any]:
        """Say where this replica has which versions; see `Residents.residency`.

        Args:
            after: `task@version`; only those after it.
            limit: Most versions to return.
        """
        return {"replica": replica_name(), **await self.residents.residency(after, limit)}

    async def prefetch(self, tasks: Collection[str]) -> None:
        """Bring tasks into host RAM; see `Residents.prefetch`."""
        await self.residents.prefetch(tasks)

    async def predict(
        self,
        task: str,
        version: str,
        problem_type: ProblemType,
        inputs: list[tuple[list[int], list[int] | None]],
    ) -> list[Answer]:
        """Answer inputs of one task, for whoever has this replica for itself.

        Args:
            task: The task.
            version: The version that must answer; no other will.
            problem_type: How its logits become scores.
            inputs: (ids, type ids) of each input, see `deployments.rows.Tokens`.

        Returns:
            For each input its answer, see `deployments.rows.Reply`.

        Raises:
            AdapterError: The version cannot be had.
            BatchLoopDied: This replica cannot answer, and is about to be replaced.
        """
        async with self.residents.pin(task, version) as slot:
            rows = [Row(slot, Tokens(*given), problem_type, task) for given in inputs]
            answers = await asyncio.gather(
                *(self.answer(row) for row in rows), return_exceptions=True
            )
        return [as_data(answer) for answer in answers]

    async def exchange(
        self, replica: str, ingress: str, heard: int, parcels: Sequence[Parcel], gone: Sequence[int]
    ) -> Reply:
        """Take an ingress's rows and reply with its answers; see `Exchange.call`.

        What is meant for another `replica`, which Serve does not find any more, is not taken.
        """
        if replica != self._exchange.replica:
            return self._exchange.not_taken()
        return await self._exchange.call(ingress, heard, parcels, gone)

    async def address(self, replica: str) -> Address | None:
        """Say where this replica takes calls past Serve; None if nowhere, or it is another one."""
        return self._listener.address if replica == self._exchange.replica else None

    async def publish(self, heard: dict[str, int]) -> tuple[str, Residency | None]:
        """Say who this is, and what changed in its slots after the change that was last `heard`."""
        name = self._exchange.replica
        return name, self._news.since(heard.get(name, 0))

    @dynamic_batch
    async def answer(self, rows: list[Row]) -> list[Prediction | Exception]:
        """Answer one row; what reaches the body is the batch that it went through in."""
        lengths = [row.num_tokens for row in rows]
        answers: list[Prediction | Exception]
        try:
            answers, seconds = await self._on_device(timed, self.engine.predict, rows)
        except DoesNotFit:
            self.planner.note_too_large(lengths)
            raise
        except torch.AcceleratorError as error:
            # After an illegal access no kernel runs any more.
            self.health.lose("the device does not answer any more")
            raise BatchLoopDied(self.health.problem) from error
        ran = zip(lengths, answers, strict=True)
        self.planner.note([n for n, answer in ran if not isinstance(answer, BadRow)], seconds)
        if any(isinstance(answer, NoNumber) for answer in answers):
            await self._check_base()  # the fault of an adapter or a text, or everybody's?
            if self.health.problem is not None:
                raise BatchLoopDied(self.health.problem)
        return answers

    async def check_health(self) -> None:
        """Raise if no row can be answered any more, so that Serve replaces this replica."""
        self.health.check(batch_queue(self.answer), self.planner.last_tokens_per_s)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell what `deployments.scaling` goes by."""
        queue = batch_queue(self.answer)
        return {
            QUEUED: float(queue.num_queued_tokens if queue is not None else 0),
            SPEED: self.planner.tokens_per_s,
            ANSWERED: self.planner.answered_tokens_per_s(),
        }

    async def _check_base(self) -> None:
        """See whether the base itself still gives numbers."""
        if not await self._on_device(self.engine.gives_numbers):
            self.health.lose("the base gives no numbers, but NaN or infinity")

    async def _follow_catalog(self, args: Args) -> None:
        """Keep and forget what the catalog says, if there is one: without Serve there is none."""
        poll = catalog_poll()
        if poll is None:
            return
        journal = Journal(open_documents(args.adapter_store))
        self._watch = Watch(journal.newer, poll, self._heed)
        await self._watch.start()

    async def _heed(self, old: Snapshot, new: Snapshot, changed: Collection[str]) -> None:
        await self.residents.follow(old, new)

    async def _on_device(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._device, work, *args)
