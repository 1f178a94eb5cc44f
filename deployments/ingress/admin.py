"""HTTP routes that change the catalog, and those that tell of changes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field

from adapters.errors import TASK_NAME, VERSION_NAME, TaskNotFound, VersionNotFound
from adapters.store import Store
from deployments.errors import INTERNAL, BadInput, Unauthorized, to_problem
from deployments.ingress.access import Access
from deployments.ingress.catalog import Catalog
from deployments.ingress.documented import (
    CHANGE_ANSWERS,
    FORM,
    NEW_VERSION,
    PAGE,
    Limit,
    TaskName,
    VersionName,
    if_match,
)
from deployments.ingress.residency import AskReplicas, merge
from deployments.ingress.sources import Sources
from deployments.ingress.uploads import Uploads
from deployments.snapshot import TaskPatch

_ETAG = re.compile(r'"([0-9]{1,18})"')


class NewVersion(BaseModel):
    """`POST /v1/tasks/{task}/versions`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    source: str = Field(
        description="A folder: hf://org/name@revision, s3://…, gs://… or file://….",
        examples=["hf://acme/sentiment@main"],
    )
    activate: bool = Field(False, description="Whether it answers at once; a first one always.")


def add_change_routes(
    api: FastAPI,
    catalog: Catalog,
    store: Store,
    access: Access,
    sources: Sources,
    ask_replicas: AskReplicas,
) -> None:
    """Add all routes of this file to the HTTP application.

    Args:
        api: The application.
        catalog: The one writer.
        store: Where versions are staged.
        access: Who may change something.
        sources: What fetches versions from elsewhere.
        ask_replicas: Asks every model replica for a page of its residency.
    """
    api.add_exception_handler(Unauthorized, _unauthorized)
    api.include_router(_changes(catalog, Uploads(store, catalog, sources), access))
    api.include_router(_records(catalog, ask_replicas))


def _guarded(access: Access) -> type[APIRoute]:
    class Guarded(APIRoute):
        """A route that asks who may before it reads a byte of the body."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            answer = super().get_route_handler()

            async def guarded(request: Request) -> Response:
                headers = request.headers
                request.state.by = access.check(headers.get("authorization"), headers.get("origin"))
                return await answer(request)

            return guarded

    return Guarded


def _changes(catalog: Catalog, uploads: Uploads, access: Access) -> APIRouter:
    bearer = Depends(HTTPBearer(auto_error=False, description="ONEBASE_ADMIN_TOKEN"))  # for /docs
    router = APIRouter(
        route_class=_guarded(access),
        dependencies=[bearer, Depends(if_match)],
        responses=CHANGE_ANSWERS,
    )

    @router.put(
        "/v1/tasks/{task}/versions",
        summary="Upload a version's files",
        openapi_extra=FORM,
        responses=NEW_VERSION,
    )
    async def upload(
        task: TaskName,
        request: Request,
        activate: Annotated[bool, Query(description="Whether it answers at once.")] = False,
    ) -> JSONResponse:
        change = _change(request)
        return _answer(request, await uploads.upload(task, request, activate=activate, **change))

    @router.post(
        "/v1/tasks/{task}/versions",
        summary="Fetch a version from elsewhere",
        responses=NEW_VERSION,
    )
    async def add(task: TaskName, body: NewVersion, request: Request) -> JSONResponse:
        change = _change(request)
        answer = await uploads.add(task, body.source, activate=body.activate, **change)
        return _answer(request, answer)

    @router.patch("/v1/tasks/{task}", summary="Change a task's rules, traffic and pins")
    async def patch(task: TaskName, body: TaskPatch, request: Request) -> JSONResponse:
        _check(task)
        _check_rules(body.rules)
        given = body.model_dump(mode="json", exclude_unset=True)
        return _answer(request, await catalog.patch(task, given, **_change(request)))

    @router.post("/v1/tasks/{task}/rollback", summary="Activate what was active before")
    async def rollback(task: TaskName, request: Request) -> JSONResponse:
        _check(task)
        return _answer(request, await catalog.rollback(task, **_change(request)))

    @router.delete("/v1/tasks/{task}", summary="Delete a task and all its files")
    async def delete_task(task: TaskName, request: Request) -> JSONResponse:
        _check(task)
        return _answer(request, await catalog.delete(task, None, **_change(request)))

    @router.delete("/v1/tasks/{task}/versions/{version}", summary="Delete a version's files")
    async def delete_version(
        task: TaskName, version: VersionName, request: Request
    ) -> JSONResponse:
        _check(task, version)
        return _answer(request, await catalog.delete(task, version, **_change(request)))

    return router


def _records(catalog: Catalog, ask_replicas: AskReplicas) -> APIRouter:
    """Routes that only tell, and are open as the listing of tasks is."""
    router = APIRouter()

    @router.get("/v1/revisions/{n}", summary="Whether every ingress answers by a revision")
    async def get_revision(n: Annotated[int, Path(ge=0)]) -> JSONResponse:
        return JSONResponse(await catalog.revision(n))

    @router.get("/v1/history", summary="Changes, the newest first")
    async def get_history(
        task: Annotated[str | None, Query(description="Of this task alone.")] = None,
        before: Annotated[
            int | None, Query(ge=1, description="The page before's `next`, a revision.")
        ] = None,
        limit: Limit = PAGE,
    ) -> JSONResponse:
        changes, more = await catalog.history(task, before, limit)
        told: dict[str, Any] = {"changes": changes}
        if more:
            told["next"] = changes[-1]["revision"]
        return JSONResponse(told)

    @router.get("/v1/residency", summary="Which replica holds which version, and where")
    async def get_residency(
        after: Annotated[str, Query(description="The page before's `next`.")] = "",
        limit: Limit = PAGE,
    ) -> JSONResponse:
        return JSONResponse(merge(await ask_replicas(after, limit), limit))

    return router


def _change(request: Request) -> dict[str, Any]:
    """Return who asks, and the condition that `If-Match` sets."""
    given = request.headers.get("if-match")
    if given is None or given == "*":
        return {"by": request.state.by, "if_match": None}
    etag = _ETAG.fullmatch(given)
    if etag is None:
        raise BadInput(
            f'If-Match: {given[:100]} is not one etag of a task, such as "5", and not *; '
            "GET /v1/tasks/{task} answers with it"
        )
    return {"by": request.state.by, "if_match": int(etag[1])}


def _answer(request: Request, answer: dict[str, Any]) -> JSONResponse:
    """Say what a change has done: 202 while an ingress still answers by the state before it."""
    headers = {"etag": f'"{answer["etag"]}"'}
    status = 201 if answer.get("created") else 200
    if not answer["everywhere"]:
        status = 202
        mounted = request.scope.get("root_path", "")
        headers["location"] = f"{mounted}/v1/revisions/{answer['revision']}"
    return JSONResponse(answer, status, headers)


def _check(task: str, version: str | None = None) -> None:
    if not TASK_NAME.fullmatch(task):
        raise TaskNotFound(task)
    if version is not None and not VERSION_NAME.fullmatch(version):
        raise VersionNotFound(task, version)


def _check_rules(rules: dict[str, Any]) -> None:
    """Refuse what the catalog's files cannot hold, or would hold as something else."""
    try:
        json.dumps(rules, allow_nan=False)  # orjson makes null of what is not finite
        orjson.dumps(rules)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"rules: they cannot be kept as JSON: {error}") from None


async def _unauthorized(request: Request, error: Exception) -> JSONResponse:
    problem = to_problem(error) or INTERNAL
    return JSONResponse(
        problem.body(),
        problem.status,
        headers={"www-authenticate": "Bearer"},
        media_type="application/problem+json",
    )
