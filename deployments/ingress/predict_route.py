"""The predict routes without FastAPI's routing, injection and encoding, which cost more than both.

FastAPI keeps routes of the same paths: for /docs, and for every request that is out of the ordinary
in any way, so that there is one place that says what is wrong with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.ingress.door import TIMEOUT, to_deadline, until
from deployments.ingress.fanout import FanOut
from deployments.ingress.many import ManyRequest
from deployments.ingress.predict import Predictor
from deployments.ingress.wire import PredictRequest

_PATH, _MANY = re.compile(r"/v1/tasks/([^/]+)/predict"), "/v1/predict"
_JSON = b"application/json"

_TIMEOUT = TIMEOUT.lower().encode()

Explain = Callable[[Request, Exception], Awaitable[Response]]


class _Way(NamedTuple):
    """Who answers a request on a path, and what such a request is."""

    kind: type[PredictRequest]
    check_room: Callable[[], None]
    predict: Callable[[Any, str | None, float | None], Awaitable[dict[str, Any]]]


class _Asked(NamedTuple):
    request: PredictRequest
    key: str | None
    timeout_s: float | None


class PredictRoute:
    """ASGI middleware that answers predictions itself and passes everything else on."""

    def __init__(
        self,
        app: ASGIApp,
        predictor: Predictor,
        fan_out: FanOut | None,
        default_task: str | None,
        before_each: Callable[[], Awaitable[None]] | None,
        explain: Explain,
    ) -> None:
        """Take the app behind it, who answers for one task and for many, and who tells of errors.

        The rest is as in `deployments.ingress.routes.make_api`.
        """
        self._app = app
        self._before_each = before_each
        self._predictor, self._fan_out = predictor, fan_out
        self._default_task = default_task
        self._explain = explain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        way = self._way(scope)
        if way is None:
            await self._app(scope, receive, send)
            return
        try:
            body = await _read(receive)
            asked = None
            if body is not None:
                way.check_room()
                asked = _parse(scope, body, way.kind)
            if asked is not None:
                deadline_s = to_deadline(asked.timeout_s)
                if self._before_each is not None:
                    async with until(deadline_s):
                        await self._before_each()
                answer = orjson.dumps(await way.predict(asked.request, asked.key, deadline_s))
        except Exception as error:
            response = await self._explain(Request(scope), error)
            await response(scope, receive, send)
            return
        if body is None:
            return  # the caller has gone
        if asked is None:
            await self._app(scope, _again(body, receive), send)
            return
        length = str(len(answer)).encode()
        headers = [(b"content-length", length), (b"content-type", _JSON)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    def _way(self, scope: Scope) -> _Way | None:
        """Return who answers a request, None if it is not an ordinary prediction."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return None
        path: str = scope["path"]
        mounted: str = scope.get("root_path", "")
        if mounted and path.startswith(mounted + "/"):
            path = path[len(mounted) :]
        kind = (_header(scope, b"content-type") or b"").partition(b";")[0].strip()
        if kind != _JSON:
            return None
        if path == _MANY and self._fan_out is not None:
            return _Way(ManyRequest, _no_check, self._fan_out.predict)
        found = _PATH.fullmatch(path)
        task = found[1] if found else self._default_task if path == "/predict" else None
        if task is None:
            return None
        return _Way(
            PredictRequest,
            partial(self._predictor.check_room, task),
            partial(self._predictor.predict, task),
        )


def _no_check() -> None:
    """A task without room fails alone among many."""


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


def _parse(scope: Scope, body: bytes, kind: type[PredictRequest]) -> _Asked | None:
    """Read an ordinary request; None if something in it is not as it should be."""
    key, timeout = _header(scope, b"x-routing-key"), _header(scope, _TIMEOUT)
    try:
        timeout_s = None if timeout is None else float(timeout)
        if timeout_s is not None and not 0 < timeout_s < math.inf:
            return None
        request = kind.model_validate_json(body)
    except ValueError:  # pydantic's is one
        return None
    return _Asked(request, None if key is None else key.decode("latin-1"), timeout_s)


async def _read(receive: Receive) -> bytes | None:
    """Read a body to its end; None if it has none."""
    message = await receive()
    body: bytes = message.get("body", b"")
    parts = [body]
    while message["type"] != "http.disconnect" and message.get("more_body", False):
        message = await receive()
        parts.append(message.get("body", b""))
    if message["type"] == "http.disconnect":
        return None
    return b"".join(parts) if len(parts) > 1 else body


def _again(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that was read to who reads next, and then whatever follows it."""
    given = False

    async def read() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return read
