"""HTTP only: paths, problem+json, and the generated documentation at /docs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from adapters.errors import AdapterError
from deployments.errors import INTERNAL, BadInput, Problem, RequestError, to_problem
from deployments.ingress.documented import PAGE, Limit, TaskName
from deployments.ingress.door import TIMEOUT, to_deadline
from deployments.ingress.fanout import FanOut
from deployments.ingress.limits import BodyLimit
from deployments.ingress.listing import AskUsage, Listing
from deployments.ingress.many import ManyRequest
from deployments.ingress.predict import Predictor
from deployments.ingress.predict_route import PredictRoute
from deployments.ingress.tasks import Tasks
from deployments.ingress.wire import PredictRequest, explain

logger = logging.getLogger("ray.serve")

After = Annotated[str, Query(description="The last task of the page before: its `next`.")]
RoutingKey = Annotated[
    str | None,
    Header(
        alias="X-Routing-Key",
        description="Requests of a task with the same key are answered by the same version.",
    ),
]

Timeout = Annotated[
    Annotated[float, Field(gt=0, allow_inf_nan=False)] | None,
    Header(
        alias=TIMEOUT,
        description="In how many seconds the caller goes; what has no answer by then gets 504.",
    ),
]


class _Api(FastAPI):
    """FastAPI with middleware before all of its own, which costs more than a prediction's route.

    Attributes:
        front: What every request comes to first, and goes on to `beyond` from.
    """

    front: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; what is none, as the start of the server, is FastAPI's."""
        try:
            await (self.front if scope["type"] == "http" else self.beyond)(scope, receive, send)
        except asyncio.CancelledError as gone:
            # Serve leaves it in a cycle; with its frames a caller's texts would stay in memory too.
            raise gone.with_traceback(None) from None

    async def beyond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go through FastAPI."""
        await super().__call__(scope, receive, send)


def make_api(
    tasks: Tasks,
    predictor: Predictor,
    *,
    default_task: str | None,
    max_body_bytes: int,
    max_upload_bytes: int,
    usage: AskUsage | None = None,
    fan_out: FanOut | None = None,
    before_each: Callable[[], Awaitable[None]] | None = None,
) -> FastAPI:
    """Return the HTTP application.

    Args:
        tasks: Who knows the tasks.
        predictor: Who answers for one of them.
        default_task: The task of `POST /predict`, which is not there if this is None.
        max_body_bytes: Largest body of a request.
        max_upload_bytes: Largest upload of a version.
        usage: Asks the catalog what was counted; None where there is none.
        fan_out: Who answers `POST /v1/predict`, which is not there if this is None.
        before_each: Awaited before each request is answered; its errors are the answer.
    """
    api = _new_api(before_each)
    shortcut = PredictRoute(api.beyond, predictor, fan_out, default_task, before_each, _any)
    api.front = BodyLimit(shortcut, max_body_bytes, max_upload_bytes)
    _add_predictions(api, predictor, default_task, fan_out)
    listing = Listing(tasks, usage)

    @api.get("/v1/tasks", summary="All tasks by name, a page at a time")
    async def list_tasks(limit: Limit = PAGE, after: After = "") -> JSONResponse:
        return JSONResponse(await listing.page(after, limit))

    @api.get("/v1/tasks/{task}", summary="A task's versions, labels and rules")
    async def get_task(task: TaskName) -> JSONResponse:
        entry, etag = await listing.task(task)
        return JSONResponse(entry, headers={"etag": f'"{etag}"'})

    return api


def _add_predictions(
    api: FastAPI, predictor: Predictor, default_task: str | None, fan_out: FanOut | None
) -> None:
    @api.post("/v1/tasks/{task}/predict", summary="Classify texts by a task's adapter")
    async def predict(
        task: TaskName, body: PredictRequest, key: RoutingKey = None, timeout_s: Timeout = None
    ) -> JSONResponse:
        return JSONResponse(await predictor.predict(task, body, key, to_deadline(timeout_s)))

    if default_task is not None:

        @api.post("/predict", summary=f"The inference guide's route; answers {default_task}")
        async def predict_default(
            body: PredictRequest, key: RoutingKey = None, timeout_s: Timeout = None
        ) -> JSONResponse:
            deadline_s = to_deadline(timeout_s)
            return JSONResponse(await predictor.predict(default_task, body, key, deadline_s))

    if fan_out is not None:

        @api.post("/v1/predict", summary="Classify texts by the adapters of many tasks at once")
        async def predict_many(
            body: ManyRequest, key: RoutingKey = None, timeout_s: Timeout = None
        ) -> JSONResponse:
            return JSONResponse(await fan_out.predict(body, key, to_deadline(timeout_s)))


def _new_api(before_each: Callable[[], Awaitable[None]] | None) -> _Api:
    """Return an application without routes, whose errors are problem+json."""
    api = _Api(
        title="onebase",
        description="One base model, every task.",
        redoc_url=None,
        dependencies=[] if before_each is None else [Depends(before_each)],
    )
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(HTTPException, _http)
    # By name, since Starlette also raises on what the handler of Exception has answered: Serve
    # would log a traceback for every caller's mistake.
    for kind in (RequestError, AdapterError, Exception):
        api.add_exception_handler(kind, _any)
    return api


def _respond(problem: Problem) -> JSONResponse:
    retry = problem.retry_after_s
    return JSONResponse(
        problem.body(),
        problem.status,
        headers={} if retry is None else {"retry-after": str(retry)},
        media_type="application/problem+json",
    )


async def _any(request: Request, error: Exception) -> JSONResponse:
    problem = to_problem(error)
    if problem is None:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _respond(problem or INTERNAL)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """A body that is not what the route takes."""
    assert isinstance(error, RequestValidationError)
    return _respond(to_problem(BadInput(explain(error.errors(), skip=1))) or INTERNAL)


async def _http(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own: no such path, no such method, a body whose reading was ended."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, RequestError):  # FastAPI turns what ends the reading into a 400
        return await _any(request, error.__cause__)
    path, allowed = request.url.path, (error.headers or {}).get("Allow")
    detail = str(error.detail)
    if error.status_code == 404:
        detail = f"there is no path {path}; see /docs for those that exist"
    elif allowed:
        detail = f"{path} does not take {request.method}; use {allowed}"
    response = _respond(Problem(error.status_code, HTTPStatus(error.status_code).phrase, detail))
    response.headers.update(error.headers or {})
    return response
