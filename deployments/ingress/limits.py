"""Admission: what is too large is turned away before it is read."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import TooLarge


class BodyLimit:
    """ASGI middleware that ends the reading of a body over the limit with `TooLarge`."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        """Take the app behind it and the limit."""
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting what it reads."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"")
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            if declared.isdigit() and int(declared) > self._max_bytes:
                raise self._too_large()
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"the body is over {self._max_bytes} bytes; send fewer texts a request, "
            "or raise max_body_bytes"
        )
