"""The Ray Serve deployment that alone writes what tasks exist. One replica."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from adapters.documents import open_documents
from deployments.catalog.adoption import Adoption
from deployments.catalog.changes import Changes
from deployments.catalog.ledger import Ledger
from deployments.catalog.upkeep import Upkeep
from deployments.catalog.usage import UsageSums
from deployments.catalog.writer import Writer
from deployments.config import Args
from deployments.errors import NotReady
from deployments.rows import Facts
from deployments.snapshot import TaskPatch, Usage
from deployments.watch import POLL_S

logger = logging.getLogger("ray.serve")

# How long a change waits for the ingresses before it is answered all the same.
_REACH_S = 5.0
# How long a model replica may take to load a version.
_MODEL_S = 60.0


class Catalog:
    """Which tasks exist, which version answers each, and the only hand that changes it."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, model: DeploymentHandle[Any], args: Args
    ) -> None:
        """Read what is true from the store; nothing in memory is the only copy of anything."""
        store = args.open_store()
        writer = Writer(open_documents(args.adapter_store))
        await asyncio.to_thread(writer.refresh)
        self._usage = UsageSums()
        self._ledger = Ledger(writer, self._usage)
        self._others = Others(model)
        adoption = Adoption(self._ledger, store, self._others)
        self._changes = Changes(self._ledger, store, self._others, adoption)
        self._upkeep = Upkeep(self._ledger, self._usage, store, adoption)
        self._upkeep.start()

    async def poll(self, watcher: str, revision: int, after: str = "") -> dict[str, Any]:
        """Tell a watcher what is newer than it holds; see `deployments.catalog.feed.Feed.page`."""
        return await self._ledger.feed.page(revision, after, POLL_S)

    async def publish(
        self,
        task: str,
        staging: str,
        *,
        source: str,
        by: str,
        activate: bool,
        if_match: int | None,
    ) -> dict[str, Any]:
        """Make a version of what an ingress has staged; see `catalog.changes.Changes`."""
        return await self._changes.publish(
            task, staging, source=source, by=by, activate=activate, if_match=if_match
        )

    async def patch(
        self, task: str, patch: dict[str, Any], *, by: str, if_match: int | None
    ) -> dict[str, Any]:
        """Change what a task does; `patch` is a `deployments.snapshot.TaskPatch` as plain data."""
        changed = TaskPatch.model_validate(patch)
        return await self._changes.patch(task, changed, by=by, if_match=if_match)

    async def rollback(self, task: str, *, by: str, if_match: int | None) -> dict[str, Any]:
        """Let the version answer that was active before."""
        return await self._changes.rollback(task, by=by, if_match=if_match)

    async def delete(
        self, task: str, version: str | None, *, by: str, if_match: int | None
    ) -> dict[str, Any]:
        """Delete a version, or with None the task."""
        return await self._changes.delete(task, version, by=by, if_match=if_match)

    async def revision(self, revision: int) -> dict[str, Any]:
        """Tell whether every live ingress holds a revision."""
        waiting_for = await self._others.reach(revision, wait_s=0.5)
        return {
            "revision": revision,
            "everywhere": not waiting_for,
            "waiting_for": waiting_for,
        }

    async def history(
        self, task: str | None, before: int | None, limit: int
    ) -> list[dict[str, Any]]:
        """Return changes, the latest first: who, when, what."""
        return await self._ledger.history(task=task, before=before, limit=limit)

    async def report(self, watcher: str, counted: list[dict[str, Any]]) -> None:
        """Take what an ingress counted since it last told."""
        self._usage.add(map(Usage.model_validate, counted))

    async def usage(self, tasks: list[str]) -> dict[str, Any]:
        """Return what was counted of some tasks, by version."""
        return {task: self._usage.of(task) for task in tasks}

    async def check_health(self) -> None:
        """Raise if nothing is looked after any more, so that Serve replaces this replica."""
        if not self._upkeep.alive:
            raise RuntimeError("the catalog's upkeep has ended")

    async def __del__(self) -> None:
        """End the polls that wait; Ray Serve awaits this when the replica stops."""
        self._upkeep.stop()
        await self._ledger.feed.close()


class Others:
    """Model replicas and ingresses, reached over handles; an `effects.Effects`."""

    def __init__(self, model: DeploymentHandle[Any]) -> None:
        """Take the model's handle; the ingress, which has ours, is found by its name."""
        self._model = model
        self._app = serve.get_replica_context().app_name
        self._found: DeploymentHandle[Any] | None = None

    async def check(self, task: str, staging: str | None, rules: dict[str, Any]) -> Facts:
        """Have a model replica validate files as a load would."""
        facts: Facts = await _ask(lambda: self._model.check.remote(task, staging, rules))
        return facts

    async def describe(self, task: str, version: str, rules: dict[str, Any]) -> Facts:
        """Have a model replica validate a version."""
        facts: Facts = await _ask(lambda: self._model.describe.remote(task, version, rules))
        return facts

    async def warm(self, task: str, version: str) -> None:
        """Bring a version into a slot of every model replica."""
        for answer in await self._everywhere(self._model, "warm", _MODEL_S, task, version):
            if isinstance(answer, BaseException) and not _is_lost(answer):
                raise _plain(answer)

    async def golden(self, task: str, version: str, rules: dict[str, Any]) -> list[str]:
        """Have an ingress run a version's golden answers."""
        problems: list[str] = await _ask(
            lambda: self._ingress.try_golden.remote(task, version, rules)
        )
        return problems

    async def reach(self, revision: int, wait_s: float = _REACH_S) -> list[str]:
        """Wait until every ingress that Serve counts as running holds a revision."""
        try:
            told = await self._everywhere(self._ingress, "reach", wait_s + 1.0, revision, wait_s)
        except NotReady:
            return []  # no ingress runs: nobody can be answered by an old one
        except TimeoutError:
            return ["an ingress that does not answer"]
        return [name for name in told if isinstance(name, str)]

    @property
    def _ingress(self) -> DeploymentHandle[Any]:
        if self._found is None:
            self._found = serve.get_deployment_handle("Ingress", self._app)
        return self._found

    async def _everywhere(
        self, handle: DeploymentHandle[Any], method: str, wait_s: float, *args: Any
    ) -> list[Any]:
        """Ask all running replicas; what one of them raises stands in the place of its answer."""
        try:
            asked = handle.broadcast(method, *args)
            answers: list[Any] = await asked.results_async(timeout_s=wait_s, return_exceptions=True)
        except DeploymentUnavailableError:
            raise NotReady(f"no replica of {handle.deployment_name} is running") from None
        return answers


async def _ask(call: Callable[[], Awaitable[Any]]) -> Any:
    """Ask one replica, and once more if it is lost under the call."""
    for attempt in (1, 2):
        try:
            return await asyncio.wait_for(_awaited(call), _MODEL_S)
        except (BackPressureError, DeploymentUnavailableError, TimeoutError):
            raise NotReady("no replica could be asked; try again in a second") from None
        except RayActorError:
            if attempt == 2:
                raise NotReady("the replica was lost; try again in a second") from None
        except RayTaskError as error:
            raise _plain(error) from None


async def _awaited(call: Callable[[], Awaitable[Any]]) -> Any:
    return await call()


def _plain(error: BaseException) -> BaseException:
    """Return what a replica raised, without Ray's traceback around it."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _is_lost(answer: BaseException) -> bool:
    return isinstance(answer, RayActorError)
