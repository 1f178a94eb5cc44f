"""A proxy before an object store that breaks, delays and notes what goes through it."""

import http.client
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

from tests.clouds import Cloud

Headers = dict[str, str]
Fault = Callable[["Handler", int, Headers, bytes], None]


class Proxy:
    """Notes `requests`, "GET key" or "LIST prefix"; `fault` says of one what breaks its answer.

    With `is_unconditional` it passes requests on without their conditions. The largest body that it
    passed on for a request is in `largest_bytes`.
    """

    def __init__(self, cloud: Cloud) -> None:
        self.requests: list[str] = []
        self.largest_bytes = 0
        self.is_unconditional = False
        self.fault: Callable[[str], Fault | None] = lambda line: None
        given = {"proxy": self, "cloud": cloud}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Given", (Handler,), given))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version, timeout = "HTTP/1.1", 10
    proxy: Proxy
    cloud: Cloud

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = self.cloud.told(self.command, self.path, self.headers, body)
        self.proxy.requests.append(line)
        server = http.client.HTTPConnection(urlsplit(self.cloud.url).netloc)
        path, headers = self.path, dict(self.headers)
        if self.proxy.is_unconditional:
            path = path.replace("ifGenerationMatch=0", "")
            headers.pop("If-None-Match", None)
        server.request(self.command, path, body, headers)
        with server.getresponse() as answer:
            content, told = answer.read(), {k.lower(): v for k, v in answer.getheaders()}
        server.close()
        self.proxy.largest_bytes = max(self.proxy.largest_bytes, len(content))
        if self.command != "HEAD":
            told["content-length"] = str(len(content))
        kept = {k: v for k, v in told.items() if k not in ("transfer-encoding", "connection")}
        (self.proxy.fault(line) or whole)(self, answer.status, kept, content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on

    def log_message(self, *args: object) -> None: ...


def whole(to: Handler, status: int, headers: Headers, content: bytes, parts: int = 1) -> None:
    to.send_response_only(status)
    for name, value in headers.items():
        to.send_header(name, value)
    to.end_headers()
    for start in range(0, len(content), size := len(content) // parts + 1):
        to.wfile.write(content[start : start + size])
        time.sleep(0.1 * (parts > 1))


def error(status: int) -> Fault:
    return lambda to, _, headers, content: whole(to, status, headers | {"content-length": "0"}, b"")


def cut(to: Handler, status: int, headers: Headers, content: bytes) -> None:
    whole(to, status, headers, content[: len(content) // 2])
    to.close_connection = True  # though more was promised


def short(to: Handler, status: int, headers: Headers, content: bytes) -> None:
    honest = {k: v for k, v in headers.items() if "checksum" not in k}
    half = content[: len(content) // 2]  # as if that were all
    whole(to, status, honest | {"content-length": str(len(half))}, half)


def slow(to: Handler, status: int, headers: Headers, content: bytes) -> None:
    whole(to, status, headers, content, parts=8)


def silent(to: Handler, *_: object) -> None:
    time.sleep(1.5)
    to.close_connection = True


def gone(to: Handler, *_: object) -> None:
    to.close_connection = True
