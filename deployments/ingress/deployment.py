"""The Ray Serve deployment that everybody calls."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from fastapi import FastAPI
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from adapters.rules import ProblemType
from deployments.config import Args, tokenize_without_pool
from deployments.errors import INTERNAL, BatchLoopDied, NotReady, to_problem
from deployments.ingress.predict import Answers, Encodings, Predictor
from deployments.ingress.routes import make_api
from deployments.ingress.tasks import Tasks
from deployments.ingress.wire import to_request
from deployments.rows import Facts
from deployments.tokens import Tokenizer

logger = logging.getLogger("ray.serve")


class Ingress:
    """Routes each request to its task's adapter, over HTTP or a handle."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, model: DeploymentHandle[Any], args: Args
    ) -> None:
        """Fetch the base's tokenizer; the replica takes traffic when this returns."""
        tokenize_without_pool()
        self._model = model
        self._args = args
        self._tasks = Tasks(args.open_store(), self._describe)
        self._tokenizer = await self._fetch_tokenizer()
        self._predictor = Predictor(
            self._tasks, self._tokenizer, self._ask, max_rows=args.max_request_rows
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP application; Ray Serve calls this after the constructor."""
        return make_api(
            self._tasks,
            self._predictor,
            default_task=self._args.default_task,
            max_body_bytes=self._args.max_body_bytes,
        )

    async def predict(
        self,
        task: str,
        texts: Any,
        return_scores: bool = False,
        threshold: float | None = None,
    ) -> dict[str, Any]:
        """Answer a handle call with the same plain dict as HTTP.

        Args:
            task: The task.
            texts: One input or a list of them; an input is a text, or for a task of pairs
                `{"text": …, "text_pair": …}`.
            return_scores: Whether each result has its probabilities.
            threshold: Under it a single label is "Uncertain", one of several labels and an entity
                are left out; the task's own if None.

        Raises:
            LookupError: There is no such task.
            ValueError: The input cannot be answered; the message says what to change.
            RuntimeError: The task's adapter, or the model, is not available.
        """
        try:
            request = to_request(texts, return_scores=return_scores, threshold=threshold)
            return await self._predictor.predict(task, request)
        except Exception as error:
            problem = to_problem(error)
            if problem is None:
                logger.error("predict(%r) failed", task, exc_info=error)
            # Builtin exceptions only: the caller may have ray and none of our code.
            raise (problem or INTERNAL).exception() from None

    async def _describe(self, task: str) -> Facts:
        facts: Facts = await _reach(lambda: self._model.describe.remote(task))
        return facts

    async def _ask(
        self, task: str, version: str, problem_type: ProblemType, inputs: Encodings
    ) -> Answers:
        answers: Answers = await _reach(
            lambda: self._model.predict.remote(task, version, problem_type, inputs)
        )
        return answers

    async def _fetch_tokenizer(self) -> Tokenizer:
        pages: list[bytes] = []
        while page := await self._model.vocabulary_page.remote(len(pages)):
            pages.append(page)
        vocabulary = orjson.loads(zlib.decompress(b"".join(pages)))
        return await asyncio.to_thread(Tokenizer, vocabulary)


async def _reach(call: Callable[[], Awaitable[Any]]) -> Any:
    """Make a handle call; when its replica dies under it, once more elsewhere.

    Classification may be repeated, and Serve does not retry what a replica had accepted.
    """
    for attempt in (1, 2):
        try:
            return await call()
        except BackPressureError:
            raise NotReady("the model's queue is full; try again in a second") from None
        except DeploymentUnavailableError:
            raise NotReady("no model replica is running") from None
        except (RayActorError, BatchLoopDied):
            if attempt == 2:
                raise NotReady("the model replica was lost; try again in a second") from None
