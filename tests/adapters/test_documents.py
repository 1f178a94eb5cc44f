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
from tests.catalog.s3 import S3


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with pytest.MonkeyPatch.context() as patch, S3().running() as server:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


@pytest.fixture
def bucket(s3: S3) -> Iterator[str]:
    s3.meddle = None
    s3.requests.clear()
    yield s3.bucket()
    s3.meddle = None


@pytest.fixture(params=["folder", "file://", "no links", "memory", "s3"])
def documents(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Documents:
    if request.param == "memory":
        return open_documents(f"memory://{uuid.uuid4().hex}")
    if request.param == "s3":
        return open_documents(request.getfixturevalue("bucket"))
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


def test_s3_is_asked_by_one_conditional_put(s3: S3, bucket: str) -> None:
    documents = open_documents(bucket)
    documents.create("catalog/1.json", b"one")
    s3.requests.clear()
    documents.create("catalog/2.json", b"two" * 10**6)
    path = bucket.removeprefix("s3:/") + "/catalog/2.json"
    assert s3.requests == [("PUT", path, "*")]
    s3.requests.clear()
    assert documents.names("catalog") == ["1.json", "2.json"]
    assert documents.read("catalog/1.json") == b"one"
    with pytest.raises(FileNotFoundError):
        documents.read("catalog/3.json")
    assert [method for method, _, _ in s3.requests] == ["GET", "GET", "GET"]


def test_s3_that_knows_no_conditions_is_refused(s3: S3, bucket: str) -> None:
    def forget(app: Any, environ: dict[str, Any], start: Any) -> Any:
        environ.pop("HTTP_IF_NONE_MATCH", None)
        return app(environ, start)

    s3.meddle = forget
    documents = open_documents(bucket)
    for _ in range(2):
        with pytest.raises(OSError, match="conditional writes"):
            documents.create("catalog/1.json", b"one")
    assert documents.names("catalog") == []


def test_s3_whose_answer_was_lost_is_not_another_writer(s3: S3, bucket: str) -> None:
    documents = open_documents(bucket)
    documents.create("catalog/1.json", b"one")
    lost = []

    def lose(app: Any, environ: dict[str, Any], start: Any) -> Any:
        if environ["REQUEST_METHOD"] != "PUT" or lost:
            return app(environ, start)
        lost.append(b"".join(app(environ, lambda *told: None)))
        start("500 Internal Server Error", [("Content-Length", "0")])
        return [b""]

    s3.meddle = lose
    s3.requests.clear()
    documents.create("catalog/2.json", b"two")
    assert lost
    assert [method for method, _, _ in s3.requests] == ["PUT", "PUT", "GET"]
    assert documents.read("catalog/2.json") == b"two"


@pytest.mark.parametrize("status", ["412 Precondition Failed", "409 Conflict"])
def test_s3_of_other_makers_says_no_in_its_own_words(s3: S3, bucket: str, status: str) -> None:
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

    s3.meddle = say
    with pytest.raises(FileExistsError):
        documents.create("catalog/1.json", b"two")
    assert said
    assert documents.read("catalog/1.json") == b"one"


@pytest.mark.slow  # s3fs asks five times, 15 s each
def test_a_store_that_is_away_is_an_os_error(s3: S3, bucket: str) -> None:
    def fall(app: Any, environ: dict[str, Any], start: Any) -> Any:
        raise ConnectionResetError

    documents = open_documents(bucket)
    documents.create("catalog/1.json", b"one")
    s3.meddle = fall
    with pytest.raises(OSError, match=r"could not be asked|Read timeout") as told:
        documents.read("catalog/1.json")
    assert not isinstance(told.value, FileNotFoundError)


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ImportError, match="gcsfs"):
        open_documents("gs://bucket/store")


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
