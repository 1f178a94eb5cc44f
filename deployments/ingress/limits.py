"""Admission: what is too large is turned away before it is read."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import TooLarge


class BodyLimit:
    """ASGI middleware that ends the reading of a body over the limit with `TooLarge`.

    An answer to a body that was not read to its end closes the connection: servers would go on to
    receive the rest, and many clients see no answer before they have sent it.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_upload_bytes: int) -> None:
        """Take the app behind it, and the limits of an upload and of everything else."""
        self._app = app
        self._max_bytes = max_bytes
        self._max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting what it reads."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"")
        is_read = declared.strip(b"0") == b"" and b"transfer-encoding" not in headers
        # By its end: what Serve mounts the application under goes before it.
        is_upload = scope["method"] == "PUT" and scope["path"].endswith("/versions")
        limit = self._max_upload_bytes if is_upload else self._max_bytes
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes, is_read
            if declared.isdigit() and int(declared) > limit:
                raise _too_large(limit, is_upload)
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                raise _too_large(limit, is_upload)
            is_read |= not message.get("more_body", False)
            return message

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and not is_read:
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, counted, closing)


def _too_large(limit: int, is_upload: bool) -> TooLarge:
    if is_upload:
        return TooLarge(f"the upload is over {limit} bytes; raise max_upload_bytes")
    return TooLarge(
        f"the body is over {limit} bytes; send fewer texts a request, or raise max_body_bytes"
    )
