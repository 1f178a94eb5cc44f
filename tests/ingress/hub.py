"""A small hub: the routes of huggingface.co that its own client asks for, on this machine."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class Hub:
    """Repositories by name and revision, each revision under its commit as well.

    Attributes:
        requests: What came: method, path and the headers, in small letters.
        redirects: Path -> where it is moved to.
        token: What private ones want.
        cut: Files are torn off in the middle.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Files]] = {}
        self.renamed: dict[str, str] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.redirects: dict[str, str] = {}
        self.token: str | None = None
        self.cut = False
        self.status = 0
        self.endpoint = ""

    def add(self, name: str, files: Files, *revisions: str) -> str:
        """Make a commit that revisions point to; return its hash."""
        commit = hashlib.sha1(json.dumps([name, sorted(files)]).encode() + b"".join(
            files[path] for path in sorted(files)
        )).hexdigest()  # fmt: skip
        for revision in (commit, *(revisions or ("main",))):
            self.repositories.setdefault(name, {})[revision] = files
        self.commits = {**getattr(self, "commits", {}), id(files): commit}
        return commit

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, Files, bytes]:
        """Return status, headers and body."""
        if self.status:
            return self.status, {}, b""
        if path in self.redirects:
            return 302, {"location": self.redirects[path].encode()}, b""
        if self.token and headers.get("authorization") != f"Bearer {self.token}":
            return 401, {"x-error-code": b"RepoNotFound"}, b""
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, revision = "/".join(parts[2:4]), (parts[5:] or ["main"])[0]
            return self._info(self.renamed.get(name, name), revision)
        name, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        content = self.repositories[name][revision].get(file)
        if content is None:
            return 404, {"x-error-code": b"EntryNotFound"}, b""
        commit = self.commits[id(self.repositories[name][revision])]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'.encode()
        return 200, {"x-repo-commit": commit.encode(), "etag": etag}, content

    def _info(self, name: str, revision: str) -> tuple[int, Files, bytes]:
        if name not in self.repositories:
            return 404, {"x-error-code": b"RepoNotFound"}, b""
        files = self.repositories[name].get(revision)
        if files is None:
            return 404, {"x-error-code": b"RevisionNotFound"}, b""
        siblings = [{"rfilename": path, "size": len(files[path])} for path in files]
        body = {"id": name, "sha": self.commits[id(files)], "siblings": siblings}
        return 200, {"content-type": b"application/json"}, json.dumps(body).encode()


@contextmanager
def listen(answer: Callable[..., tuple[int, Files, bytes]], hub: Hub) -> Iterator[str]:
    """Serve until the block ends; give the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            hub.requests.append((self.command, self.path, headers))
            status, told, body = answer(self.command, path, headers)
            self.send_response(status)
            for name, value in told.items():
                self.send_header(name, value.decode())
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.cut and "/resolve/" in path:
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
