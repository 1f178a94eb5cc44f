"""The other deployments as the ingress asks them: by Ray Serve's handles, rows past them."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import Context
from typing import Any, TypeVar

import orjson
from grpc.aio import AioRpcError  # type: ignore[import-untyped]
from ray import serve
from ray.exceptions import ActorDiedError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.errors import BatchLoopDied, NotReady, ReplicasLost
from deployments.frames import Address
from deployments.ingress.calls import Answers, Encodings
from deployments.ingress.catalog import CatalogLost
from deployments.ingress.lines import Lines
from deployments.ingress.outbox import CallLost, NotTaken, ReplicaLost
from deployments.ingress.replicas import Replicas
from deployments.rows import Facts, Parcel, Reply, Residency
from deployments.tokens import Vocabulary

T = TypeVar("T")

# A change may fetch, check and warm a version first; reading is from memory.
_CHANGE_S, _READ_S = 300.0, 5.0
# A replica that died is also told as one that is unavailable, where Ray does not know yet.
_UNREACHED = (RayActorError, AioRpcError)
_AWAY = "the catalog is being started again; try again in a few seconds"


class ModelHandle:
    """The model replicas."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        """Take Serve's handle."""
        self._handle = handle
        self._lines = Lines(self._find)
        self._replicas = Replicas(self)

    async def vocabulary(self) -> Vocabulary:
        """Return the base's tokenizer; see `deployments.tokens.Tokenizer`."""
        pages: list[bytes] = []
        while page := await self._handle.vocabulary_page.remote(len(pages)):
            pages.append(page)
        vocabulary: Vocabulary = orjson.loads(zlib.decompress(b"".join(pages)))
        return vocabulary

    async def describe(
        self, task: str, version: str | None = None, rules: dict[str, Any] | None = None
    ) -> Facts:
        """Ask what a version, or with None a task's plain folder, is."""
        facts: Facts = await _reach(lambda: self._handle.describe.remote(task, version, rules))
        return facts

    async def predict(
        self, facts: Facts, inputs: Encodings, deadline_s: float | None = None
    ) -> Answers:
        """Have inputs answered; see `Replicas.ask`."""
        return await self._replicas.ask(facts, inputs, deadline_s)

    async def exchange(
        self, replica: str, ingress: str, heard: int, parcels: Sequence[Parcel], gone: Sequence[int]
    ) -> Reply:
        """Call one replica; see `replicas.Calls`."""
        line = self._lines.to(replica)
        if line is not None:
            return await line.call(ingress, heard, parcels, gone)
        call = self._handle.options(
            method_name="exchange",
            session_id=replica,
            request_serialization="pickle",
            response_serialization="pickle",
        )
        try:
            reply: Reply = await call.remote(replica, ingress, heard, parcels, gone)
        except ActorDiedError as error:
            raise ReplicaLost(str(error)) from None
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise NotTaken(str(error)) from None
        except _UNREACHED as error:
            raise CallLost(str(error)) from None
        return reply

    async def publish(self, heard: dict[str, int]) -> list[tuple[str, Residency | None] | None]:
        """Ask all replicas who they are; see `replicas.Calls`."""
        told = [
            None if isinstance(answer, Exception) else answer
            for answer in await self._all("publish", heard)
        ]
        if None not in told:
            self._lines.keep([name for name, _ in filter(None, told)])
        return told

    async def residency(self, after: str, limit: int) -> list[dict[str, Any]]:
        """Ask all replicas what they hold; one that is lost meanwhile is left out."""
        answers = await self._all("residency", after, limit)
        if not answers:
            raise NotReady("no model replica is running")
        return [answer for answer in answers if isinstance(answer, dict)]

    async def _find(self, replica: str) -> Address | None:
        """Ask where a replica takes calls past Serve."""
        call = self._handle.options(method_name="address", session_id=replica)
        try:
            address: Address | None = await call.remote(replica)
        except (BackPressureError, DeploymentUnavailableError, *_UNREACHED):
            return None
        return address

    async def _all(self, method: str, *given: Any) -> list[Any]:
        """Call all replicas; what one that is lost meanwhile answers is an exception."""
        try:
            asked = self._handle.broadcast(method, *given)
            answers: list[Any] = await asked.results_async(
                timeout_s=_READ_S, return_exceptions=True
            )
        except DeploymentUnavailableError:
            return []
        except TimeoutError:
            raise NotReady("no model replica answers; try again in a second") from None
        return answers


class CatalogHandle:
    """The catalog's one replica; a `catalog.Catalog`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        """Take Serve's handle."""
        self._handle = handle
        self.is_away: Callable[[], bool] = lambda: False

    async def poll(self, revision: int, after: str) -> dict[str, Any]:
        """Wait for news, and so say what this ingress holds; see `catalog.feed.Feed.page`."""
        own = serve.get_replica_context().replica_id.unique_id
        page: dict[str, Any] = await self._handle.poll.remote(revision, after, own)
        return page

    async def publish(self, task: str, staging: str, **given: Any) -> dict[str, Any]:
        """See `catalog.Catalog.publish`."""
        return await self._change(lambda: self._handle.publish.remote(task, staging, **given))

    async def patch(self, task: str, patch: Mapping[str, Any], **given: Any) -> dict[str, Any]:
        """See `catalog.Catalog.patch`."""
        return await self._change(lambda: self._handle.patch.remote(task, dict(patch), **given))

    async def rollback(self, task: str, **given: Any) -> dict[str, Any]:
        """See `catalog.Catalog.rollback`."""
        return await self._change(lambda: self._handle.rollback.remote(task, **given))

    async def delete(self, task: str, version: str | None, **given: Any) -> dict[str, Any]:
        """See `catalog.Catalog.delete`."""
        return await self._change(lambda: self._handle.delete.remote(task, version, **given))

    async def revision(self, n: int) -> dict[str, Any]:
        """See `catalog.Catalog.revision`."""
        answer: dict[str, Any] = await self._read(lambda: self._handle.revision.remote(n))
        return answer

    async def history(
        self, task: str | None, before: int | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        """See `catalog.Catalog.history`."""
        answer: tuple[list[dict[str, Any]], bool] = await self._read(
            lambda: self._handle.history.remote(task, before, limit)
        )
        return answer

    async def report(self, counted: list[dict[str, Any]]) -> None:
        """Tell what was counted since the last time."""
        await self._read(lambda: self._handle.report.remote(counted))

    async def usage(self, tasks: list[str]) -> dict[str, dict[str, Any]] | None:
        """Ask what was counted of tasks, by version; None if the catalog is away."""
        try:
            told: dict[str, Any] = await self._read(lambda: self._handle.usage.remote(tasks))
        except NotReady:
            return None
        return told

    async def _read(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await self._ask(call, _READ_S)
        except (RayActorError, TimeoutError):
            raise NotReady(_AWAY) from None

    async def _change(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await self._ask(call, _CHANGE_S)
        except (RayActorError, TimeoutError):
            raise CatalogLost(
                "the catalog was lost while it worked on this change, which may have been made "
                "or not; read the task again"
            ) from None

    async def _ask(self, call: Callable[[], Awaitable[T]], wait_s: float) -> T:
        if self.is_away():  # a call would wait for a replica that is being started
            raise NotReady(_AWAY)
        try:
            return await asyncio.wait_for(_awaited(call), wait_s)
        except (BackPressureError, DeploymentUnavailableError):
            raise NotReady(_AWAY) from None


async def _awaited(call: Callable[[], Awaitable[T]]) -> T:
    return await call()


async def _reach(call: Callable[[], Awaitable[T]]) -> T:
    """Make a handle call; when its replica dies under it, once more elsewhere.

    Classification may be repeated, and Serve does not retry what a replica had accepted.
    """
    for attempt in (1, 2):
        try:
            # Of no request: in one's context Serve gives all calls the same id, and of two that
            # are on their way at a time it would lose one.
            calling = asyncio.get_running_loop().create_task(_awaited(call), context=Context())
            return await calling
        except BackPressureError:
            raise NotReady("the model's queue is full; try again in a second") from None
        except DeploymentUnavailableError:
            raise NotReady("no model replica is running") from None
        except (RayActorError, BatchLoopDied):
            if attempt == 2:
                raise ReplicasLost("the model replica was lost; try again in a second") from None
    raise AssertionError("the last attempt returns or raises")
