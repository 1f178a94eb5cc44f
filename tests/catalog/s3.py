"""A real S3 API on this machine, one request at a time, whose requests a test can meddle with."""

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import fsspec
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

Answer = Any
App = Callable[[dict[str, Any], Any], Answer]
Meddle = Callable[[App, dict[str, Any], Any], Answer]


class S3:
    """moto's server. One thread answers, since moto looks whether a key is there and then puts it;
    two requests at a time would come in between, which S3 never lets them."""

    def __init__(self) -> None:
        self._app: App = DomainDispatcherApplication(create_backend_app)
        self._server = make_server(
            "127.0.0.1", 0, self._answer, threaded=False, request_handler=MotoRequestHandler
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, If-None-Match
        self.meddle: Meddle | None = None
        self._thread = threading.Thread(target=self._server.serve_forever)

    def _answer(self, environ: dict[str, Any], start: Any) -> Answer:
        asked = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((*asked, environ.get("HTTP_IF_NONE_MATCH")))
        return self.meddle(self._app, environ, start) if self.meddle else self._app(environ, start)

    @contextmanager
    def running(self) -> Iterator["S3"]:
        # fsspec keeps what reached the server before this one.
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def bucket(self) -> str:
        """Make a bucket, and return its URL."""
        name = f"b{uuid.uuid4().hex}"
        client = boto3.client("s3", endpoint_url=self.url, region_name="us-east-1")
        client.create_bucket(Bucket=name)
        client.close()
        return f"s3://{name}/store"
