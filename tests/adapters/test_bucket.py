"""An object store behind a network that stumbles: real clients, a real API, a proxy between."""

import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapters import objects
from adapters.bucket import Bucket
from adapters.errors import (
    AdapterIncomplete,
    AdapterRefused,
    StoreUnreachable,
    VersionNotFound,
)
from adapters.filesystem import Limits
from adapters.store import MAX_JSON_BYTES, Store, digest, open_store
from tests.adapters.proxy import Fault, Proxy, cut, error, short, silent, slow
from tests.clouds import Cloud

Contents = Callable[..., dict[str, bytes]]
Put = Callable[[str, dict[str, bytes]], str]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def proxy(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(cloud)
    monkeypatch.setenv(cloud.points_here, proxy.url)
    monkeypatch.setattr(objects, "_WAITS_S", (0.01, 0.02, 0.04))
    yield proxy
    proxy.stop()


@pytest.fixture
def open_bucket(cloud: Cloud, proxy: Proxy, tmp_path: Path) -> Callable[[str], Store]:
    """Returns a machine's view of the one bucket: its disk cache is its own."""
    return lambda machine: open_store(f"{cloud.scheme}://bucket/s", cache=tmp_path / machine)


@pytest.fixture
def store(open_bucket: Callable[[str], Store]) -> Store:
    return open_bucket("one")


@pytest.fixture
def put(cloud: Cloud) -> Put:
    def put(path: str, files: dict[str, bytes]) -> str:
        for name, content in files.items():
            cloud.put(f"s/{path}/{name}", content)
        return digest(files)

    return put


def times(number: int, fault: Fault, part: str) -> Callable[[str], Fault | None]:
    """Break the first requests that have a part in their line."""
    left = [fault] * number
    return lambda line: left.pop() if part in line and left else None


def always(fault: Fault, part: str = "") -> Callable[[str], Fault | None]:
    return lambda line: fault if part in line else None


FAULTS = {"500": error(500), "503": error(503), "cut": cut, "short": short}


@pytest.mark.parametrize(
    ("fault", "part"),
    [(fault, WEIGHTS) for fault in FAULTS] + [(fault, "LIST ") for fault in ("500", "cut")],
)
def test_what_goes_wrong_twice_is_asked_for_again(
    proxy: Proxy, store: Store, put: Put, contents: Contents, fault: str, part: str
) -> None:
    version = put(f"mood/{digest(contents())}", contents())
    proxy.fault = times(2, FAULTS[fault], part)
    assert store.read("mood", version).contents == contents()
    assert sum(part in line for line in proxy.requests) == 3


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (error(500), "does not answer"),
        (cut, "does not answer"),
        (short, r"came with \d+ of \d+ bytes"),
        (error(403), "does not answer"),
    ],
    ids=["500", "cut", "short", "403"],
)
def test_what_goes_on_going_wrong_is_told_and_nothing_of_it_is_kept(
    proxy: Proxy, store: Store, put: Put, contents: Contents, fault: Fault, said: str
) -> None:
    version = put(f"mood/{digest(contents())}", contents())
    proxy.fault = always(fault, WEIGHTS)
    with pytest.raises(AdapterIncomplete, match=said) as caught:
        store.read("mood", version)
    assert store.url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert store.on_disk() == set()
    proxy.fault = always(error(500))
    with pytest.raises(StoreUnreachable, match=f"the store {store.url} does not answer"):
        store.tasks()


def test_a_slow_body_is_waited_for_and_a_silent_one_is_not(
    proxy: Proxy, open_bucket: Callable[[str], Store], put: Put, contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(objects, "_LIMITS", Limits(connect_s=0.5, read_s=0.5, max_parts=1))
    store = open_bucket("one")
    files = contents(tokenizer__json=b"t" * 100_000)
    version = put(f"mood/{digest(files)}", files)
    proxy.fault = always(slow, "tokenizer.json")  # 0.8 s in all
    assert store.read("mood", version).contents == files
    store.forget("mood", version)
    proxy.fault = always(silent, WEIGHTS)
    with pytest.raises(AdapterIncomplete, match="does not answer"):
        store.read("mood", version)
    assert len([line for line in proxy.requests if WEIGHTS in line]) == 1 + 4


def test_an_object_that_is_shorter_than_it_was_listed_is_not_served(
    proxy: Proxy, store: Store, put: Put, cloud: Cloud, contents: Contents
) -> None:
    put("mood", contents())

    def truncate(line: str) -> None:
        if WEIGHTS in line:
            cloud.put(f"s/mood/{WEIGHTS}", contents()[WEIGHTS][:-9])

    proxy.fault = truncate
    assert len(cloud.names()) == 2
    with pytest.raises(AdapterIncomplete):
        store.read("mood")
    proxy.fault = lambda line: None
    with pytest.raises(AdapterIncomplete, match=r"has \d+ of \d+ bytes"):  # as on a directory
        store.read("mood")


def test_a_plain_folder_that_changes_while_it_is_read_is_not_served(
    proxy: Proxy, store: Store, put: Put, contents: Contents
) -> None:
    put("mood", contents(1))

    def change(line: str) -> None:
        if line == f"GET s/mood/{WEIGHTS}":
            put("mood", contents(2))

    proxy.fault = change
    with pytest.raises(AdapterIncomplete, match="changed while it was read"):
        store.read("mood")


def test_no_more_is_asked_for_than_is_needed(
    proxy: Proxy, cloud: Cloud, store: Store, put: Put, contents: Contents
) -> None:
    files = contents(task__json=b"{}")
    unread = {"adapter_model.bin": b"pickle", "optimizer.pt": b"pickle"}
    version = put(f"mood/{digest(files)}", files | unread)
    put("mood/00000000", contents(2))
    store.look("mood", version)
    assert len(proxy.requests) == 1
    proxy.requests.clear()
    store.read("mood", version)
    assert proxy.requests[0] == "LIST s/mood/"
    asked = [f"GET s/mood/{version}/{name}" for name in sorted(files)]
    assert sorted(proxy.requests[1:]) == asked
    proxy.requests.clear()
    store.read("mood", version)  # from the disk
    assert len(proxy.requests) == 1
    proxy.requests.clear()
    with pytest.raises(Exception, match="absent"):
        store.look("absent")
    assert len(proxy.requests) == {"s3": 1, "gs": 2}[cloud.scheme]  # gcsfs makes sure


def test_a_history_of_any_length_is_not_listed(
    proxy: Proxy, cloud: Cloud, store: Store, put: Put, contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("adapters.listing._PAGE", 20)
    tasks = ["0", "catalo", "catalog-2", "catalog.x", "catalog0", "mood"]
    for task in tasks:
        put(task, contents())
    before = store.folders()
    assert sorted(before) == store.tasks() == tasks
    for number in range(200):
        cloud.put(f"s/catalog/history/{number}.json", b"{}")
    for number in range(50):
        cloud.put(f"s/.staging/{number:032x}/files/task.json", b"{}")
    proxy.requests.clear()
    assert store.folders() == before
    assert store.tasks() == tasks
    assert len(proxy.requests) <= 2 * 4, "a page of each, and what is behind"
    put("mood", contents(2))
    changed = store.folders()
    assert {task for task in tasks if changed[task] != before[task]} == {"mood"}


@pytest.mark.parametrize("name", ["adapter_config.json", "task.json"])
def test_a_file_of_absurd_size_is_never_fetched(
    proxy: Proxy, store: Store, put: Put, contents: Contents, name: str
) -> None:
    files = contents() | {name: b" " * (MAX_JSON_BYTES + 1)}
    put("mood", files)
    with pytest.raises(AdapterRefused, match=f"{name} has {MAX_JSON_BYTES + 1} bytes, over the"):
        store.read("mood")
    assert not [line for line in proxy.requests if name in line]


def test_a_file_that_grows_after_it_was_listed_is_not_fetched_without_end(
    proxy: Proxy, store: Store, put: Put, contents: Contents
) -> None:
    put("mood", contents(tokenizer__json=b"{}"))

    def grow(line: str) -> None:
        if line.startswith("LIST "):
            put("mood", {"tokenizer.json": b" " * 2**20})

    proxy.fault = grow
    with pytest.raises(AdapterIncomplete, match="changed while it was read"):
        store.read("mood")
    assert proxy.largest_bytes < 2**16


def test_a_pickle_alone_is_refused_unread(
    proxy: Proxy, store: Store, put: Put, contents: Contents
) -> None:
    put("mood", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
    with pytest.raises(AdapterRefused, match=r"only adapter_model\.bin, a pickle"):
        store.read("mood")
    assert not [line for line in proxy.requests if ".bin" in line]


def test_a_corrupted_disk_cache_is_fetched_anew_and_the_others_stay(
    proxy: Proxy,
    open_bucket: Callable[[str], Store],
    put: Put,
    contents: Contents,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    version = put(f"mood/{digest(contents())}", contents(task__json=b'{"threshold": 0.5}'))
    one, two = open_bucket("one"), open_bucket("two")
    answers = [store.read("mood", version) for store in (one, two)]
    assert one.on_disk() == two.on_disk() == {("mood", version)}
    (weights,) = (tmp_path / "one").rglob(WEIGHTS)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"\1")
    proxy.requests.clear()
    caplog.clear()  # google-auth looks for a machine of Google's
    with caplog.at_level(logging.WARNING, "ray.serve"):
        again = [store.read("mood", version) for store in (one, two)]
    assert again == answers
    (said,) = caplog.messages
    assert f"adapter=mood@{version} is damaged in the disk cache and is fetched again" in said
    assert sum(WEIGHTS in line for line in proxy.requests) == 1
    (weights,) = (tmp_path / "one").rglob(WEIGHTS)
    assert weights.read_bytes() == whole


def test_a_version_on_the_disk_is_served_while_the_store_is_away(
    proxy: Proxy,
    open_bucket: Callable[[str], Store],
    put: Put,
    contents: Contents,
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = contents(task__json=b'{"threshold": 0.5}')
    version = put(f"mood/{digest(files)}", files)
    read, look = open_bucket("one").read("mood", version), open_bucket("one").look("mood", version)
    proxy.fault = always(error(503))
    later = open_bucket("one")
    assert later.look("mood", version) == look
    assert later.read("mood", version) == read
    assert f"adapter=mood@{version} is read from the disk cache" in caplog.text
    for call in (later.look, later.read):
        for given in (("mood",), ("mood", "0" * 8), ("spam", version)):
            with pytest.raises(AdapterIncomplete):
                call(*given)


def test_a_version_that_is_gone_from_the_store_is_not_served_from_the_disk(
    store: Store, put: Put, cloud: Cloud, contents: Contents
) -> None:
    version = put(f"mood/{digest(contents())}", contents())
    put("mood/11111111", contents(2))
    store.read("mood", version)
    for name in contents():
        cloud.delete(f"s/mood/{version}/{name}")
    with pytest.raises(VersionNotFound):
        store.read("mood", version)
    # Published again, by somebody else, with other rules.
    put(f"mood/{version}", contents(task__json=b'{"threshold": 0.9}'))
    assert store.read("mood", version).contents["task.json"] == b'{"threshold": 0.9}'


def test_a_removed_or_forgotten_version_is_gone_from_the_disk(
    store: Store, put: Put, contents: Contents, tmp_path: Path
) -> None:
    version = put(f"mood/{digest(contents())}", contents())
    for let_go in (store.forget, store.remove):
        store.read("mood", version)
        assert store.on_disk() == {("mood", version)}
        let_go("mood", version)
        assert store.on_disk() == set()
        assert not list((tmp_path / "one").rglob(WEIGHTS))


def test_what_others_put_is_seen_at_once(store: Store, put: Put, contents: Contents) -> None:
    assert store.tasks() == []
    assert store.unfinished() == []
    put("mood", contents(1))
    assert store.tasks() == ["mood"]
    before = store.look("mood")
    version = put(f"mood/{digest(contents(2))}", contents(2))
    assert store.versions("mood") == [version]
    assert store.look("mood") == before


def stage(store: Store, files: dict[str, bytes]) -> str:
    return store.stage({name: io.BytesIO(content) for name, content in files.items()})


def test_the_config_of_a_version_is_copied_last(
    proxy: Proxy, store: Store, contents: Contents
) -> None:
    version = digest(contents())
    staging = stage(store, contents(task__json=b"{}"))
    proxy.requests.clear()
    store.publish(staging, "mood", version)
    written = [line for line in proxy.requests if line.startswith("PUT ")]
    assert written[0] == f"PUT s/.staging/{staging}/publishing.json"
    assert written[-1] == f"PUT s/mood/{version}/adapter_config.json"
    assert len(written) == 4


def test_a_publication_that_fails_or_dies_at_any_copy_is_no_version(
    proxy: Proxy, store: Store, contents: Contents, cloud: Cloud
) -> None:
    files = contents(task__json=b"{}")
    version = digest(files)
    for name in files:
        for dies in (False, True):
            staging = stage(store, files)
            refuse = always(error(500), f"PUT s/mood/{version}/{name}")
            # One that is dead cleans nothing up.
            gone = always(error(500), "DELETE") if dies else (lambda line: None)
            proxy.fault = lambda line, refuse=refuse, gone=gone: refuse(line) or gone(line)
            with pytest.raises(StoreUnreachable):
                store.publish(staging, "mood", version)
            proxy.fault = lambda line: None
            assert (store.tasks(), store.versions("mood")) == ([], [])
            assert dies or not [key for key in cloud.names() if key.startswith("s/mood")]
            assert store.unfinished() == [(staging, "mood", version)]
            store.remove("mood", version)
            store.discard(staging)
            assert cloud.names() == []


def test_an_upload_that_the_store_does_not_take_leaves_nothing(
    proxy: Proxy, store: Store, contents: Contents, cloud: Cloud
) -> None:
    proxy.fault = always(error(500), "PUT s/.staging")
    with pytest.raises(StoreUnreachable):
        stage(store, contents())
    proxy.fault = lambda line: error(500) if line.startswith("PUT") and WEIGHTS in line else None
    with pytest.raises(StoreUnreachable):
        stage(store, contents())
    assert cloud.names() == []


def test_a_staging_that_cannot_be_read_is_the_store_s_fault_and_not_the_upload_s(
    proxy: Proxy, store: Store, contents: Contents
) -> None:
    staging = stage(store, contents())
    proxy.fault = always(error(500), "GET s/.staging")
    with pytest.raises(StoreUnreachable):
        store.read_staged(staging, "mood")


def test_a_bucket_that_does_not_exist_is_told(cloud: Cloud, tmp_path: Path) -> None:
    store = open_store(f"{cloud.scheme}://nowhere/s", cache=tmp_path / "cache")
    assert isinstance(store, Bucket)
    with pytest.raises(StoreUnreachable, match="there is no such bucket"):
        store.tasks()


@pytest.mark.parametrize(
    ("url", "said"),
    [("hf://org/name", "a source of versions, not a"),
     ("ftp://host/s", "is no store"), ("s3://", "names nothing"), ("file://host/s", "is no store")],
)  # fmt: skip
def test_what_is_no_store_is_told_in_a_sentence(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        open_store(url)
