"""The other deployments as the catalog asks them, over Ray Serve's handles."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.catalog.ingresses import Ingresses
from deployments.errors import BadInput, NotReady, RequestError
from deployments.internals import is_dead, running_replicas
from deployments.rows import Facts

_INGRESS = "Ingress"
# How long a change waits for the ingresses before it is answered all the same.
_REACH_S = 5.0
# How long a model replica may take to load a version.
_MODEL_S = 60.0
# How long an ingress may run a version's golden answers. With the rest of a change it is less than
# the ingress that asked for the change waits.
_GOLDEN_S = 150.0


class Others:
    """Model replicas and ingresses, reached over handles; an `effects.Effects`.

    Attributes:
        ingresses: Who holds which revision.
    """

    def __init__(self, model: DeploymentHandle[Any]) -> None:
        """Take the model's handle; the ingress, which has ours, is found by its name."""
        self._model = model
        self._app = serve.get_replica_context().app_name
        self._found: DeploymentHandle[Any] | None = None
        self.ingresses = Ingresses(lambda: running_replicas(self._app, _INGRESS), is_dead)

    async def check(self, task: str, staging: str | None, rules: dict[str, Any]) -> Facts:
        """Have a model replica validate files as a load would."""
        facts: Facts = await _ask(lambda: self._model.check.remote(task, staging, rules))
        return facts

    async def describe(self, task: str, version: str, rules: dict[str, Any]) -> Facts:
        """Have a model replica validate a version."""
        facts: Facts = await _ask(lambda: self._model.describe.remote(task, version, rules))
        return facts

    async def warm(self, task: str, *versions: str) -> None:
        """Bring versions into slots of every model replica."""
        try:
            answers = await self._everywhere(self._model, "warm", _MODEL_S, task, *versions)
        except TimeoutError:
            names = " and ".join(f"{task}@{version}" for version in versions)
            raise NotReady(
                f"{names} came into no slot of some replica within {_MODEL_S:.0f} s"
            ) from None
        for answer in answers:
            if isinstance(answer, BaseException) and not _is_lost(answer):
                raise _plain(answer)

    async def forget(self, task: str, version: str) -> None:
        """Have every model replica let go of a version that is none."""
        with contextlib.suppress(Exception):  # it goes when others need its place
            await self._everywhere(self._model, "forget", _REACH_S, task, version)

    async def golden(self, task: str, version: str, rules: dict[str, Any]) -> list[str]:
        """Have an ingress run a version's golden answers."""
        late = BadInput(
            f"the golden.jsonl of {task}@{version} takes more than {_GOLDEN_S:.0f} s to run; "
            "give it fewer lines"
        )
        problems: list[str] = await _ask(
            lambda: self._ingress.try_golden.remote(task, version, rules), _GOLDEN_S, late
        )
        return problems

    async def reach(self, revision: int, wait_s: float = _REACH_S) -> list[str]:
        """Wait until every ingress that Serve lists holds a revision."""
        return await self.ingresses.reach(revision, wait_s)

    @property
    def _ingress(self) -> DeploymentHandle[Any]:
        if self._found is None:
            self._found = serve.get_deployment_handle(_INGRESS, self._app)
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


async def _ask(
    call: Callable[[], Awaitable[Any]],
    wait_s: float = _MODEL_S,
    late: RequestError | None = None,
) -> Any:
    """Ask one replica for so long, and once more if it is lost under the call; `late` is raised."""
    for attempt in (1, 2):
        try:
            return await asyncio.wait_for(_awaited(call), wait_s)
        except TimeoutError:
            told = f"no replica has answered within {wait_s:.0f} s; try again in a second"
            raise late or NotReady(told) from None
        except (BackPressureError, DeploymentUnavailableError):
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
