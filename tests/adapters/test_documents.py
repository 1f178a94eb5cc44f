import errno
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.documents import Documents, open_documents
from tests.adapters.proxy import Proxy, error, gone
from tests.catalog.s3 import S3
from tests.clouds import Cloud


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with pytest.MonkeyPatch.context() as patch, S3().running() as one:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", one.url)
        yield one


@pytest.fixture
def bucket(server: S3) -> Iterator[str]:
    server.meddle = None
    server.requests.clear()
    yield server.bucket()
    server.meddle = None


@pytest.fixture(params=["folder", "file://", "no links", "memory", "s3", "gs"])
def documents(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Documents:
    if request.param == "memory":
        return open_documents(f"memory://{uuid.uuid4().hex}")
    if request.param == "s3":
        return open_documents(request.getfixturevalue("bucket"))
    if request.param == "gs":
        request.getfixturevalue("gs")
        return open_documents("gs://bucket/store")
    if request.param == "no links":
        monkeypatch.setattr(os, "link", no_links)
    return open_documents(f"file://{tmp_path}" if request.param == "file://" else str(tmp_path))


def no_links(source: Path, target: Path) -> None:
    raise PermissionError(errno.EPERM, "as FAT says")


def test_a_document_is_made_read_listed_and_deleted(documents: Documents) -> None:
    assert documents.names("catalog") == []
    documents.create("catalog/1.json", b"one")
    documents.create("catalog/2.json", b"two")
    documents.create("catalog/history/1.json", b"why")
    assert documents.read("catalog/1.json") == b"one"
    assert sorted(documents.names("catalog")) == ["1.json", "2.json"]
    assert documents.names("catalog/history") == ["1.json"]
    documents.delete("catalog/1.json")
    documents.delete("catalog/1.json")
    documents.delete("nothing/1.json")
    with pytest.raises(FileNotFoundError):
        documents.read("catalog/1.json")
    assert documents.names("catalog") == ["2.json"]


def test_what_is_there_is_never_overwritten(documents: Documents) -> None:
    documents.create("catalog/1.json", b"first")
    with pytest.raises(FileExistsError):
        documents.create("catalog/1.json", b"second")
    assert documents.read("catalog/1.json") == b"first"


def test_the_same_again_is_a_repeated_request(documents: Documents) -> None:
    documents.create("catalog/1.json", b"first")
    documents.create("catalog/1.json", b"first")
    assert documents.names("catalog") == ["1.json"]


def test_of_many_at_a_time_one_is_first(documents: Documents) -> None:
    won: list[list[int]] = [[] for _ in range(8)]

    def race(me: int) -> None:
        for number in range(8):
            try:
                documents.create(f"catalog/{number}.json", b"%d" % me * 10_000)
            except FileExistsError:
                continue
            won[me].append(number)

    threads = [threading.Thread(target=race, args=[me]) for me in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for mine in won for number in mine) == list(range(8))
    for me, mine in enumerate(won):
        for number in mine:
            assert documents.read(f"catalog/{number}.json") == b"%d" % me * 10_000
    assert len(documents.names("catalog")) == 8


@pytest.mark.parametrize("links", [True, False])
def test_a_folder_that_writers_have_mounted_in_two_ways_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    documents = open_documents(str(tmp_path))
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    documents.create("catalog/1.json", b"first")
    monkeypatch.undo()
    if links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(FileExistsError):
        documents.create("catalog/1.json", b"second")
    assert documents.read("catalog/1.json") == b"first"
    assert os.listdir(tmp_path / "catalog") == ["1.json"]


def test_a_directory_is_durable_before_create_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    fsync, link = os.fsync, os.link

    def named(descriptor: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path)

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        done.append(("synced", named(descriptor).partition("/.")[0]))

    def linked(source: Path, target: Path) -> None:
        assert source.read_bytes() == b"all of it"
        link(source, target)
        done.append(("linked", os.path.relpath(target, tmp_path)))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    open_documents(str(tmp_path)).create("catalog/history/1.json", b"all of it")
    assert done == [
        ("synced", "."),  # lists catalog
        ("synced", "catalog"),  # lists history
        ("synced", "catalog/history"),  # the temporary file's own content
        ("linked", "catalog/history/1.json"),
        ("synced", "catalog/history"),
    ]


def test_what_killed_writers_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    folder = tmp_path / "catalog"
    (folder / ".8.json.0123456789abcdef").mkdir(parents=True)
    (folder / ".8.json.0123456789abcdef/document").write_bytes(b"x")
    for name in (".9.json.456789abcdef0123", ".9.json.89abcdef01234567"):
        (folder / name).write_bytes(b"x")
    for name in (".8.json.0123456789abcdef", ".9.json.456789abcdef0123"):
        os.utime(folder / name, (0, time.time() - 3700))
    documents = open_documents(str(tmp_path))
    assert documents.names("catalog") == []
    documents.create("catalog/1.json", b"one")
    assert sorted(os.listdir(folder)) == [".9.json.89abcdef01234567", "1.json"]


@pytest.fixture
def proxy(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(cloud)
    monkeypatch.setenv(cloud.points_here, proxy.url)
    yield proxy
    proxy.stop()


@pytest.fixture
def far(cloud: Cloud, proxy: Proxy) -> Documents:
    """Documents in an object store, with the proxy between."""
    return open_documents(f"{cloud.scheme}://bucket/store")


def test_an_object_store_is_asked_by_one_conditional_request(
    cloud: Cloud, proxy: Proxy, far: Documents
) -> None:
    far.create("catalog/1.json", b"one")
    proxy.requests.clear()
    far.create("catalog/2.json", b"two" * 10**6)
    assert proxy.requests == ["CREATE store/catalog/2.json"]
    proxy.requests.clear()
    assert far.names("catalog") == ["1.json", "2.json"]
    assert far.read("catalog/1.json") == b"one"
    with pytest.raises(FileNotFoundError):
        far.read("catalog/3.json")
    assert proxy.requests == [
        "LIST store/catalog/", "GET store/catalog/1.json", "GET store/catalog/3.json"
    ]  # fmt: skip


def test_an_object_store_that_knows_no_conditions_is_refused(proxy: Proxy, far: Documents) -> None:
    proxy.is_unconditional = True
    for _ in range(2):
        with pytest.raises(OSError, match="conditional writes"):
            far.create("catalog/1.json", b"one")
    assert far.names("catalog") == []


def test_a_writer_whose_answer_was_lost_is_not_another_writer(proxy: Proxy, far: Documents) -> None:
    far.create("catalog/1.json", b"one")
    lost = [error(500)]
    proxy.requests.clear()
    proxy.fault = lambda line: lost.pop() if lost and line.startswith("CREATE") else None
    far.create("catalog/2.json", b"two")
    name = "store/catalog/2.json"
    assert proxy.requests == [f"CREATE {name}", f"CREATE {name}", f"GET {name}"]
    proxy.fault = lambda line: None
    assert far.read("catalog/2.json") == b"two"


def test_an_object_store_that_is_away_is_an_os_error(proxy: Proxy, far: Documents) -> None:
    far.create("catalog/1.json", b"one")
    for fault in (gone, error(502), error(503)):
        proxy.requests.clear()
        proxy.fault = lambda line, fault=fault: fault
        with pytest.raises(OSError) as told:  # noqa: PT011
            far.read("catalog/1.json")
        assert not isinstance(told.value, FileNotFoundError)
    assert len(proxy.requests) == 5


@pytest.mark.parametrize("status", ["412 Precondition Failed", "409 Conflict"])
def test_s3_of_other_makers_says_no_in_its_own_words(server: S3, bucket: str, status: str) -> None:
    """No `Condition` in a 412; the 409 of two writes at one time, after which one asks again."""
    documents = open_documents(bucket)
    documents.create("catalog/1.json", b"one")
    said = []

    def say(app: Any, environ: dict[str, Any], start: Any) -> Any:
        if environ["REQUEST_METHOD"] != "PUT" or (status.startswith("409") and said):
            return app(environ, start)
        said.append(status)
        environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        code = "PreconditionFailed" if status.startswith("412") else "ConditionalRequestConflict"
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    server.meddle = say
    with pytest.raises(FileExistsError):
        documents.create("catalog/1.json", b"two")
    assert said
    assert documents.read("catalog/1.json") == b"one"


def test_a_link_in_the_place_of_the_folder_is_refused_and_nothing_there_is_touched(
    tmp_path: Path,
) -> None:
    outside = tmp_path / "outside"
    for name in (".ssh", ".7.json.0123456789abcdef"):
        (outside / name).mkdir(parents=True)
        os.utime(outside / name, (0, 0))
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "catalog").symlink_to(outside)
    documents = open_documents(str(tmp_path / "store"))
    with pytest.raises(OSError, match="is a link"):
        documents.create("catalog/1.json", b"{}")
    assert sorted(os.listdir(outside)) == [".7.json.0123456789abcdef", ".ssh"]


def test_only_what_writers_leave_is_removed(tmp_path: Path) -> None:
    for name in (".git", ".8.json.0123456789abcdef"):
        (tmp_path / "catalog" / name).mkdir(parents=True)
        os.utime(tmp_path / "catalog" / name, (0, 0))
    open_documents(str(tmp_path)).create("catalog/1.json", b"{}")
    assert sorted(os.listdir(tmp_path / "catalog")) == [".git", "1.json"]


def test_a_pipe_is_not_waited_for_and_a_linked_file_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "store" / "catalog"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "1.json")
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "2.json").symlink_to(tmp_path / "secret")
    documents = open_documents(str(tmp_path / "store"))
    for name in ("1.json", "2.json"):
        with pytest.raises(OSError):  # noqa: PT011
            documents.read(f"catalog/{name}")
