"""The Ray Serve deployment that everybody calls."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from adapters.directory import Directory
from adapters.documents import open_documents
from adapters.store import GOLDEN, MAX_GOLDEN_BYTES
from deployments.config import Args, ConfigError, admin_token, tokenize_without_pool
from deployments.errors import INTERNAL, NotReady, to_problem
from deployments.garbage import look_seldom, look_when_calm
from deployments.ingress.access import Access
from deployments.ingress.admin import add_change_routes
from deployments.ingress.door import check_timeout, to_deadline, until
from deployments.ingress.fanout import FanOut
from deployments.ingress.folders import Folders
from deployments.ingress.golden import try_golden
from deployments.ingress.handles import CatalogHandle, ModelHandle
from deployments.ingress.many import to_many_request
from deployments.ingress.predict import Predictor
from deployments.ingress.routes import make_api
from deployments.ingress.sources import Sources
from deployments.ingress.tasks import Tasks
from deployments.ingress.usage import report
from deployments.ingress.wire import to_request
from deployments.internals import bind_host
from deployments.journal import Journal
from deployments.room import Room
from deployments.settings import INGRESS_KEYS, laid_over
from deployments.snapshot import Snapshot
from deployments.tokens import Tokenizer
from deployments.watch import Watch

logger = logging.getLogger("ray.serve")

# An object store is listed once in so long at most for names that nobody knows.
_LIST_EVERY_S = 1.0
_REPORT_EVERY_S = 1.0
# Beside so few rows a look for garbage holds nobody up.
_CALM_ROWS = 256


class Ingress:
    """Routes each request to its task's adapter, over HTTP or a handle."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, model: DeploymentHandle[Any], catalog: DeploymentHandle[Any], args: Args
    ) -> None:
        """Read the catalog, fetch the base's tokenizer; the replica takes traffic after that."""
        look_seldom()
        tokenize_without_pool()
        self._args = args
        self._model = ModelHandle(model)
        self._catalog = CatalogHandle(catalog)
        self._store = args.open_store()
        journal = Journal(open_documents(args.adapter_store))
        self._watch = Watch(journal.newer, self._catalog.poll, self._prepare, self._hold)
        self._catalog.is_away = lambda: self._watch.away
        looks = isinstance(self._store, Directory)
        self._tasks = Tasks(
            Folders(
                self._store, self._model.describe, list_every_s=None if looks else _LIST_EVERY_S
            ),
            self._model.describe,
            silent_s=lambda: self._watch.stale_s,
            refuse_when_lost=args.on_lost_catalog == "refuse",
        )
        tokenizer = await asyncio.to_thread(Tokenizer, await self._model.vocabulary())
        self._predictor = Predictor(
            self._tasks,
            tokenizer,
            self._model.predict,
            room := Room(args.max_rows_on_the_way),
            max_rows=args.max_request_rows,
        )
        self._fan_out = FanOut(
            self._tasks,
            self._predictor,
            max_tasks=args.max_request_tasks,
            max_rows=args.max_request_rows,
        )
        await self._watch.start()
        self._reporting = asyncio.get_running_loop().create_task(
            report(
                self._predictor.tally,
                self._catalog.report,
                _REPORT_EVERY_S,
            )
        )
        self._looking = asyncio.get_running_loop().create_task(
            look_when_calm(lambda: room.num_taken <= _CALM_ROWS)
        )

    def reconfigure(self, user_config: Any) -> None:
        """Take what a Serve YAML changes in place; what is wrong changes nothing and is logged.

        Raising would cost this replica, and the next one, which would be told the same.
        """
        try:
            args = laid_over(self._args, user_config, INGRESS_KEYS)
        except ConfigError as error:
            logger.error("user_config of Ingress is refused, and nothing changes: %s", error)
            return
        self._predictor.limit(args.max_request_rows)
        self._fan_out.limit(args.max_request_tasks, args.max_request_rows)
        self._tasks.refuse_when_lost = args.on_lost_catalog == "refuse"

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP application; Ray Serve calls this after the constructor."""
        args = self._args
        api = make_api(
            self._tasks,
            self._predictor,
            default_task=args.default_task,
            max_body_bytes=args.max_body_bytes,
            max_upload_bytes=args.max_upload_bytes,
            usage=self._catalog.usage,
            fan_out=self._fan_out,
            before_each=self._catch_up,
        )
        add_change_routes(
            api,
            self._catalog,
            self._store,
            Access(bind_host(), admin_token()),
            Sources(args.allowed_sources, self._store, max_bytes=args.max_upload_bytes),
            self._model.residency,
        )
        return api

    async def predict(
        self,
        task: str,
        texts: Any,
        return_scores: bool = False,
        threshold: float | None = None,
        routing_key: str | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Answer a handle call with the same plain dict as HTTP.

        Args:
            task: The task.
            texts: One input or a list of them; an input is a text, or for a task of pairs
                `{"text": …, "text_pair": …}`.
            return_scores: Whether each result has its probabilities.
            threshold: Under it a single label is "Uncertain", one of several labels and an entity
                are left out; the task's own if None.
            routing_key: Calls with the same one are answered by the same version.
            timeout_s: In how many seconds the caller goes; None if never.

        Raises:
            LookupError: There is no such task.
            ValueError: The input cannot be answered; the message says what to change.
            TimeoutError: There was no answer in time.
            RuntimeError: The task's adapter, or the model, is not available, or has too much to do.
        """
        try:
            request = to_request(texts, return_scores=return_scores, threshold=threshold)
            deadline_s = to_deadline(check_timeout(timeout_s))
            async with until(deadline_s):
                await self._catch_up()
            return await self._predictor.predict(task, request, routing_key, deadline_s)
        except Exception as error:
            raise _builtin(error, f"predict({task!r})") from None

    async def predict_many(
        self,
        tasks: Any,
        texts: Any,
        return_scores: bool = False,
        threshold: float | None = None,
        routing_key: str | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Answer a handle call for many tasks with the same plain dict as `POST /v1/predict`.

        Args:
            tasks: Their names, each once, or `{"match": "guard-*"}`.
            texts: As `predict`; so are the others, for each of the tasks.
            return_scores: As `predict`.
            threshold: As `predict`.
            routing_key: As `predict`.
            timeout_s: As `predict`; what is not answered by then is among the errors.

        Raises:
            LookupError: No task's name fits the pattern.
            ValueError: The request cannot be answered; the message says what to change.
            RuntimeError: The store is not available. What fails for a task is in its answer.
        """
        try:
            request = to_many_request(
                tasks, texts, return_scores=return_scores, threshold=threshold
            )
            deadline_s = to_deadline(check_timeout(timeout_s))
            async with until(deadline_s):
                await self._catch_up()
            return await self._fan_out.predict(request, routing_key, deadline_s)
        except Exception as error:
            raise _builtin(error, "predict_many") from None

    async def try_golden(self, task: str, version: str, rules: dict[str, Any]) -> list[str]:
        """Run a version's golden.jsonl, if it has one, under rules laid over its own.

        Returns:
            A sentence for each line that misses; empty if all hold, or there is no such file.

        Raises:
            NotReady: No model replica could be asked.
            AdapterError: The version cannot be had.
        """
        content = await asyncio.to_thread(
            self._store.read_file, task, version, GOLDEN, MAX_GOLDEN_BYTES
        )
        if content is None:
            return []
        facts = await self._model.describe(task, version, rules)
        return await try_golden(content, facts, self._predictor.runs)

    async def _catch_up(self) -> None:
        """Before the first request: hold what was written since this ingress read the store."""
        try:
            await self._watch.catch_up()
        except Exception as error:
            logger.warning("catalog: no first look at the store: %r", error)
            if self._tasks.refuse_when_lost:
                raise NotReady(
                    "this ingress has just started and cannot read the store to learn what "
                    "is true; try again in a second"
                ) from None

    async def _prepare(self, old: Snapshot, new: Snapshot, changed: Collection[str]) -> None:
        await self._tasks.prepare(old, new, changed)

    def _hold(self, snapshot: Snapshot) -> None:
        self._tasks.snapshot = snapshot


def _builtin(error: Exception, call: str) -> Exception:
    """Return an error as a handle's caller gets it, who may have ray and none of our code."""
    problem = to_problem(error)
    if problem is None:
        logger.error("%s failed", call, exc_info=error)
    return (problem or INTERNAL).exception()
