"""The change routes behind a real server, over a catalog that tells what it was asked."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2
import uvicorn

from adapters.store import Store
from deployments.errors import NotReady
from deployments.ingress.access import Access
from deployments.ingress.admin import add_change_routes
from deployments.ingress.routes import make_api
from deployments.ingress.sources import Sources


class Catalog:
    """Answers each call by its own name and arguments; raises `error` instead if there is one."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.asked: list[dict[str, Any]] = []
        self.published: list[dict[str, bytes]] = []
        self.error: Exception | None = None
        self.answer: dict[str, Any] = {"revision": 7, "etag": 7, "everywhere": True}
        self.changes: list[dict[str, Any]] = []
        self.wait: Any = None

    def _told(self, call: str, **given: Any) -> dict[str, Any]:
        self.asked.append({"call": call, **given})
        if self.error is not None:
            raise self.error
        return {**self.answer, **self.asked[-1]}

    async def publish(self, task: str, staging: str, **given: Any) -> dict[str, Any]:
        if self.wait is not None:
            await asyncio.to_thread(self.wait.wait)
        files = self.store.read_staged(staging, task)
        self.published.append(dict(files.contents))
        try:
            return self._told("publish", task=task, version=files.version, **given)
        finally:
            if not isinstance(self.error, NotReady):  # which says that it was never reached
                self.store.discard(staging)

    async def patch(self, task: str, patch: Any, **given: Any) -> dict[str, Any]:
        return self._told("patch", task=task, patch=patch, **given)

    async def rollback(self, task: str, **given: Any) -> dict[str, Any]:
        return self._told("rollback", task=task, **given)

    async def delete(self, task: str, version: str | None, **given: Any) -> dict[str, Any]:
        return self._told("delete", task=task, version=version, **given)

    async def revision(self, revision: int) -> dict[str, Any]:
        return {"revision": revision, "everywhere": False, "waiting_for": ["ingress-1"]}

    async def history(
        self, task: str | None, before: int | None, limit: int
    ) -> tuple[list[Any], bool]:
        fitting = [
            change
            for change in self.changes
            if task in (None, change["task"]) and (before is None or change["revision"] < before)
        ]
        return fitting[:limit], len(fitting) > limit


class Server:
    """A catalog, and a client of the routes over it.

    Attributes:
        pages: What the model replicas answer of their residency.
    """

    def __init__(self, catalog: Catalog, http: httpx2.Client) -> None:
        self.catalog = catalog
        self.http = http
        self.pages: Sequence[dict[str, Any]] = ()

    async def ask_replicas(self, after: str, limit: int) -> Sequence[dict[str, Any]]:
        return self.pages


@contextmanager
def serve(
    store: Store,
    *,
    host: str = "127.0.0.1",
    token: str | None = None,
    allowed: Sequence[str] = (),
    max_upload_bytes: int = 2**24,
) -> Iterator[Server]:
    """Listen on a free port until the block ends; `host` is what the rule of access is told."""
    # A connection each: one that an answer has closed must not be taken for the next request.
    limits = httpx2.Limits(max_keepalive_connections=0)
    with httpx2.Client(timeout=30, trust_env=False, limits=limits) as http:
        server = Server(Catalog(store), http)
        api = make_api(
            None, None, default_task=None, max_body_bytes=4096, max_upload_bytes=max_upload_bytes
        )
        sources = Sources(allowed, store, max_bytes=max_upload_bytes)
        add_change_routes(
            api, server.catalog, store, Access(host, token), sources, server.ask_replicas
        )
        with listen(api) as port:
            http.base_url = f"http://127.0.0.1:{port}"
            yield server


@contextmanager
def listen(app: Any) -> Iterator[int]:
    """Run an ASGI application in a thread; give its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def problem(response: httpx2.Response, status: int) -> str:
    """Check that a response is a problem of this status; return its detail."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == status
    assert "\n" not in response.json()["detail"]
    return response.json()["detail"]
