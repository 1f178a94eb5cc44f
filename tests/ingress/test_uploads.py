import asyncio
import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from adapters.directory import Directory
from adapters.errors import AdapterIncomplete, AdapterRefused
from deployments.errors import BadInput, NotReady, Stale, Unsure
from deployments.ingress.catalog import CatalogLost
from deployments.ingress.sources import Sources
from deployments.ingress.uploads import Uploads
from tests.ingress.server import Catalog, Server, problem, serve

PATH = "/v1/tasks/mood/versions"
MIB = 2**20


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    return Directory(tmp_path_factory.mktemp("uploads") / "store")


@pytest.fixture(scope="module")
def running(store: Directory) -> Iterator[Server]:
    with serve(store) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    running.catalog.__init__(running.catalog.store)
    return running


@pytest.fixture
def files(weights: Callable[[int], bytes]) -> dict[str, bytes]:
    return {
        "adapter_config.json": b'{"r": 8}',
        "adapter_model.safetensors": weights(1),
        "task.json": b'{"threshold": 0.5}',
        "golden.jsonl": b'{"text": "good", "scores": {"yes": 1.0}}',
    }


def form(files: dict[str, bytes], part: str = "files") -> list[Any]:
    return [(part, (name, content)) for name, content in files.items()]


def staged(store: Directory) -> list[str]:
    folder = store.root / ".staging"
    return os.listdir(folder) if folder.exists() else []


def temporaries() -> dict[str, int]:
    """This process's open files that have no name, and how long each is."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").endswith("(deleted)"):
                found[fd] = os.stat(f"/proc/self/fd/{fd}").st_size
        except OSError:
            continue
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left(store: Directory) -> Iterator[None]:
    before = temporaries().keys()
    yield
    until(lambda: temporaries().keys() <= before)
    assert staged(store) == []


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_upload_is_staged_and_published(
    server: Server, store: Directory, files: dict[str, bytes]
) -> None:
    server.catalog.answer["created"] = True
    response = server.http.put(PATH, files=form(files), headers={"if-match": '"3"'})
    assert response.status_code == 201, response.text
    assert response.headers["etag"] == '"7"'
    asked = {
        "call": "publish", "task": "mood", "version": response.json()["version"],
        "source": "upload", "by": "local", "activate": False, "if_match": 3,
    }  # fmt: skip
    assert server.catalog.asked == [asked]
    assert response.json() == {**asked, **server.catalog.answer}
    assert server.catalog.published == [files]


def test_the_same_content_twice_is_no_new_version(server: Server, files: dict[str, bytes]) -> None:
    server.catalog.answer["created"] = False
    assert server.http.put(PATH, files=form(files)).status_code == 200


def test_it_answers_at_once_only_when_told(server: Server, files: dict[str, bytes]) -> None:
    for query, activate in [("", False), ("?activate=true", True), ("?activate=false", False)]:
        server.http.put(PATH + query, files=form(files))
        assert server.catalog.asked[-1]["activate"] is activate
    assert "activate" in problem(server.http.put(f"{PATH}?activate=x", files=form(files)), 422)


def test_files_larger_than_memory_holds_of_them_arrive_whole(
    server: Server, files: dict[str, bytes]
) -> None:
    rng = np.random.default_rng(0)
    files["adapter_model.safetensors"] = save({"x": rng.random(MIB, np.float32)})
    files["tokenizer.json"] = rng.bytes(3 * MIB)
    response = server.http.put(PATH, files=form(files))
    assert response.status_code == 200, response.text
    assert server.catalog.published == [files]


@pytest.mark.parametrize(
    "name",
    ["../adapter_config.json", "store/mood/adapter_config.json", "x\\adapter_config.json",
     "/etc/passwd", "adapter_model.bin", "optimizer.pt", "Adapter_Config.json",
     "adapter_config.json ", "catalog", "publishing.json", "x" * 500, "ä\u202e.json"],
)  # fmt: skip
def test_a_name_that_is_no_adapters_is_refused_by_name(
    server: Server, files: dict[str, bytes], name: str
) -> None:
    odd = {**files, name: b"x", "README.md": b"y"}
    said = problem(server.http.put(PATH, files=form(odd)), 422)
    assert repr(name[:100]) in said
    assert "'README.md'" in said
    assert "adapter_model.safetensors" in said
    assert server.catalog.asked == []


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([("files", ("task.json", b"{}"))] * 2, "task.json comes twice"),
        ([("file", ("task.json", b"{}"))], "the part 'file'"),
        ([("files", (None, b"{}"))], "the part 'files'"),
    ],
)  # fmt: skip
def test_parts_that_are_no_files_are_refused(server: Server, parts: Any, said: str) -> None:
    response = server.http.put(PATH, files=parts)
    assert said in problem(response, 422)
    assert server.catalog.asked == []


def test_a_form_without_files_is_refused(server: Server) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert "no file" in problem(server.http.put(PATH, content=b"--x--\r\n", headers=headers), 422)


@pytest.mark.parametrize("kind", ["application/json", "application/zip", "", "multipart/mixed"])
def test_what_is_no_form_is_refused(server: Server, kind: str) -> None:
    response = server.http.put(PATH, content=b"PK", headers={"content-type": kind})
    assert "multipart/form-data" in problem(response, 422)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=x", b"no boundary"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: x\r\n\r\ny\r\n--x--"),
        ("multipart/form-data; boundary=" + "x" * 300, b"--x"),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"A: b\r\n" * 100 + b"\r\n\r\n--x--"),
    ],
)  # fmt: skip
def test_a_torn_form_is_the_callers_mistake(server: Server, kind: str, content: bytes) -> None:
    problem(server.http.put(PATH, content=content, headers={"content-type": kind}), 400)
    assert server.catalog.asked == []


def test_thousands_of_parts_are_not_opened(server: Server) -> None:
    parts = [("files", ("task.json", b"{}"))] * 5000
    assert "Too many files" in problem(server.http.put(PATH, files=parts), 400)


@pytest.mark.parametrize(
    "error", [None, Stale("it is at 9"), BadInput("no head"), NotReady("the catalog is away")]
)
def test_a_staging_has_one_owner(
    server: Server, store: Directory, files: dict[str, bytes], error: Exception | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The catalog that has it, or else the ingress."""
    discarded, discard = [], store.discard

    def count(staging: str) -> None:
        discarded.append(staging)
        discard(staging)

    monkeypatch.setattr(store, "discard", count)
    server.catalog.error = error
    server.http.put(PATH, files=form(files))
    assert len(discarded) == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (AdapterRefused("mood", ["no head", "rank 0"]), 422),
        (AdapterIncomplete("mood", "adapter_model.safetensors is missing"), 422),
        (BadInput("x: no head; x: rank 0"), 422), (Stale("it is at 9"), 412),
        (NotReady("no model replica is running"), 503), (RuntimeError("secret"), 500),
    ],
)  # fmt: skip
def test_a_refusal_is_told_whole_and_leaves_nothing(
    server: Server, files: dict[str, bytes], error: Exception, status: int
) -> None:
    server.catalog.error = error
    said = problem(server.http.put(PATH, files=form(files)), status)
    assert said == str(error) if status != 500 else "secret" not in said


@pytest.mark.parametrize("kind", [CatalogLost, Unsure])
def test_of_what_nobody_knows_the_staging_stays(
    server: Server, store: Directory, files: dict[str, bytes], kind: type[Unsure]
) -> None:
    server.catalog.error = kind("the catalog was lost")
    problem(server.http.put(PATH, files=form(files)), 503)
    (staging,) = staged(store)
    store.discard(staging)


def test_a_file_over_its_own_limit_is_refused(server: Server, files: dict[str, bytes]) -> None:
    files["task.json"] = bytes(8 * MIB + 1)
    assert "task.json is over its limit" in problem(server.http.put(PATH, files=form(files)), 413)
    assert server.catalog.asked == []


def connect(server: Server) -> socket.socket:
    url = server.http.base_url
    return socket.create_connection((url.host, url.port), timeout=10)


def head(**headers: str) -> bytes:
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    kind = "content-type: multipart/form-data; boundary=x"
    return "\r\n".join((f"PUT {PATH} HTTP/1.1", "host: here", kind, *lines, "", "")).encode()


START = (
    b"--x\r\nContent-Disposition: form-data; name=files; filename=adapter_model.safetensors\r\n\r\n"
)


def test_a_declared_length_over_the_limit_is_refused_before_anything_is_sent(
    server: Server,
) -> None:
    with connect(server) as client:
        client.sendall(head(content_length=str(10 * 2**30)))
        answer = b""
        while received := client.recv(65536):  # and the connection is closed
            answer += received
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"max_upload_bytes" in answer


def test_ten_gigabytes_without_a_length_are_cut_off_at_the_limit(server: Server) -> None:
    limit, sent, largest = 16 * MIB, 0, 0
    before = sum(temporaries().values())
    chunk = b"%x\r\n" % MIB + bytes(MIB) + b"\r\n"
    with connect(server) as client:
        client.sendall(head(transfer_encoding="chunked") + b"%x\r\n" % len(START) + START + b"\r\n")
        with suppress(ConnectionError):
            while sent < 10 * 2**30:
                client.sendall(chunk)
                sent += MIB
                largest = max(largest, sum(temporaries().values()) - before)
    assert sent < 2 * limit  # what was under way in sockets, too
    assert MIB < largest <= limit
    assert server.catalog.asked == []


def test_a_client_is_told_that_its_upload_is_too_large(server: Server) -> None:
    endless = itertools.chain([START], itertools.repeat(bytes(MIB)))
    for content in (START + bytes(32 * MIB), endless):
        headers = {"content-type": "multipart/form-data; boundary=x"}
        response = server.http.put(PATH, content=content, headers=headers)
        assert "max_upload_bytes" in problem(response, 413)


def test_the_limit_of_uploads_is_theirs_alone(server: Server) -> None:
    for method, path in [("POST", PATH), ("PATCH", "/v1/tasks/mood")]:
        response = server.http.request(method, path, content=bytes(5000))
        assert "max_body_bytes" in problem(response, 413)


def test_a_client_that_goes_midway_leaves_nothing(
    server: Server, store: Directory, caplog: pytest.LogCaptureFixture
) -> None:
    before = temporaries().keys()
    with connect(server) as client, caplog.at_level(logging.WARNING):
        client.sendall(head(content_length=str(8 * MIB)) + START + bytes(4 * MIB))
        until(lambda: bool(temporaries().keys() - before))
        client.close()
        until(lambda: temporaries().keys() <= before)
    assert server.catalog.asked == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_caller_who_goes_while_it_is_published_changes_nothing(
    store: Directory, tmp_path: Path, files: dict[str, bytes]
) -> None:
    """Serve cancels what a client has left."""
    catalog = Catalog(store)
    catalog.wait = threading.Event()
    (tmp_path / "x").mkdir()
    for name, content in files.items():
        (tmp_path / "x" / name).write_bytes(content)
    allowed = [f"file://{tmp_path}"]
    uploads = Uploads(store, catalog, Sources(allowed, store, max_bytes=2**20))
    change = {"by": "local", "activate": True, "if_match": None}
    caller = asyncio.create_task(uploads.add("mood", f"file://{tmp_path}/x", **change))
    await asyncio.to_thread(until, lambda: bool(staged(store)))
    await asyncio.sleep(0.1)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert catalog.asked == []
    catalog.wait.set()
    await asyncio.to_thread(until, lambda: not staged(store))
    assert [asked["call"] for asked in catalog.asked] == ["publish"]


def test_a_store_that_cannot_be_written_is_told(tmp_path: Path, files: dict[str, bytes]) -> None:
    (tmp_path / "store").write_text("a file in its place")
    with serve(Directory(tmp_path / "store")) as server:
        response = server.http.put(PATH, files=form(files))
        assert "cannot be written" in problem(response, 503)
