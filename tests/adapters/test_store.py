"""What every store promises, whatever it is made of."""

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pytest

from adapters.errors import (
    AdapterChanged,
    AdapterIncomplete,
    AdapterRefused,
    StagingTooLarge,
    TaskNotFound,
    VersionNotFound,
)
from adapters.store import Store, digest, open_store

Contents = Callable[..., dict[str, bytes]]
WEIGHTS = "adapter_model.safetensors"


@dataclass
class Hands:
    """What people do to a store by hand."""

    put: Callable[[str, bytes], Any]
    paths: Callable[[], list[str]]

    def folder(self, path: str, files: dict[str, bytes]) -> str:
        for name, content in files.items():
            self.put(f"{path}/{name}", content)
        return digest(files)


@pytest.fixture(params=["directory", "memory", "s3"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    if kind == "s3":
        request.getfixturevalue("s3")
    if kind == "memory":
        memory = fsspec.filesystem("memory")  # one for the whole process
        memory.store.clear()
        memory.pseudo_dirs[:] = [""]
    return {
        "directory": str(tmp_path / "store"),
        "memory": "memory://store",
        "s3": "s3://bucket/s",
    }[kind]


@pytest.fixture
def store(url: str, tmp_path: Path) -> Store:
    return open_store(url, cache=tmp_path / "cache")


@pytest.fixture
def hands(kind: str, url: str, tmp_path: Path, request: pytest.FixtureRequest) -> Hands:
    if kind == "directory":

        def write(path: str, content: bytes) -> None:
            (tmp_path / "store" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "store" / path).write_bytes(content)

        def files() -> list[str]:
            found = (tmp_path / "store").rglob("*")
            return sorted(str(p.relative_to(tmp_path / "store")) for p in found if p.is_file())

        return Hands(write, files)
    elif kind == "memory":
        memory = fsspec.filesystem("memory")
        return Hands(
            lambda path, content: memory.pipe_file(f"/store/{path}", content),
            lambda: [path.removeprefix("/store/") for path in memory.find("/store")],
        )
    else:
        s3 = request.getfixturevalue("s3")
        return Hands(
            lambda path, content: s3.put_object(Bucket="bucket", Key=f"s/{path}", Body=content),
            lambda: [
                one["Key"].removeprefix("s/")
                for one in s3.list_objects_v2(Bucket="bucket").get("Contents", [])
            ],
        )


def stage(store: Store, files: dict[str, bytes]) -> str:
    return store.stage({name: io.BytesIO(content) for name, content in files.items()})


def publish(store: Store, task: str, files: dict[str, bytes]) -> str:
    staging, version = stage(store, files), digest(files)
    store.publish(staging, task, version)
    store.discard(staging)
    return version


def test_a_plain_folder_is_a_task(store: Store, hands: Hands, contents: Contents) -> None:
    files = contents(task__json=b'{"threshold": 0.5}')
    assert store.tasks() == []
    hands.folder("mood", {**files, "README.md": b"x", "adapter_model.bin": b"pickle"})
    hands.put("catalog/1.json", b"{}")
    hands.put("catalog/adapter_config.json", b"{}")
    hands.put("UPPER/adapter_config.json", b"{}")
    hands.put("bare/README.md", b"{}")
    assert store.tasks() == ["mood"]
    assert store.versions("mood") == []
    read = store.read("mood")
    assert (read.task, read.contents, read.version) == ("mood", files, digest(files))
    looked = store.look("mood")
    assert {name: size for name, size, _ in looked.entries} == {
        **{name: len(content) for name, content in files.items()},
        "adapter_model.bin": 6,
    }
    assert abs(looked.changed_s - time.time()) < 60
    assert store.look("mood") == looked
    hands.put("mood/task.json", b'{"threshold": 0.6}')  # as long as before
    assert store.look("mood") != looked
    for call in (store.look, store.read, store.versions):
        with pytest.raises(TaskNotFound, match="'catalog' is taken"):
            call("catalog")


def test_what_was_staged_becomes_a_version_at_once(
    store: Store, hands: Hands, contents: Contents
) -> None:
    files = contents(task__json=b"{}", golden__jsonl=b"[]")
    version = digest(files)
    staging = stage(store, files)
    assert len(staging) == 32
    assert (store.tasks(), store.versions("mood")) == ([], [])
    read = store.read_staged(staging, "mood")
    assert (read.task, read.version) == ("mood", version)
    assert read.contents == files
    assert store.unfinished() == [(staging, None, None)]
    store.publish(staging, "mood", version)
    assert store.unfinished() == [(staging, "mood", version)]
    assert (store.tasks(), store.versions("mood")) == (["mood"], [version])
    assert store.read("mood", version).contents == read.contents
    assert store.look("mood", version).entries
    assert store.read_file("mood", version, "golden.jsonl", 100) == b"[]"
    with pytest.raises(TaskNotFound):
        store.read("mood")
    store.discard(staging)
    store.discard(staging)
    assert store.unfinished() == []
    assert hands.paths() == sorted(f"mood/{version}/{name}" for name in files)


def test_a_version_that_is_there_is_kept(store: Store, hands: Hands, contents: Contents) -> None:
    version = publish(store, "mood", contents(task__json=b'{"threshold": 0.5}'))
    before = store.look("mood", version)
    staging = stage(store, contents(task__json=b'{"threshold": 0.7}'))
    store.publish(staging, "mood", version)
    # Without a marker: if this process died now, nobody may take the version for half a one.
    assert store.unfinished() == [(staging, None, None)]
    assert store.look("mood", version) == before
    assert store.versions("mood") == [version]


def test_a_folder_that_is_not_what_its_name_says_is_refused_and_can_be_published_anew(
    store: Store, hands: Hands, contents: Contents
) -> None:
    version = publish(store, "mood", contents())
    hands.put(f"mood/{version}/tokenizer.json", b"{}")
    found = digest(contents(tokenizer__json=b"{}"))
    with pytest.raises(AdapterRefused, match=f"its folder {version} holds version {found}"):
        store.read("mood", version)
    assert publish(store, "mood", contents()) == version
    assert store.read("mood", version).contents == contents()
    assert f"mood/{version}/tokenizer.json" not in hands.paths()
    assert not [path for path in hands.paths() if path.startswith(".staging")]


def test_a_version_without_weights_can_be_published_anew(
    store: Store, hands: Hands, contents: Contents
) -> None:
    version = digest(contents())
    hands.put(f"mood/{version}/adapter_config.json", b"{}")
    with pytest.raises(AdapterIncomplete, match="safetensors is missing"):
        store.read("mood", version)
    publish(store, "mood", contents())
    assert store.read("mood", version).contents == contents()


def test_a_version_without_a_folder_is_the_plain_one_if_that_holds_it(
    store: Store, hands: Hands, contents: Contents
) -> None:
    with pytest.raises(TaskNotFound):
        store.read("mood", "0" * 8)
    version = hands.folder("mood", contents(1))
    assert store.read("mood", version).contents == contents(1)
    assert store.look("mood", version) == store.look("mood")
    with pytest.raises(AdapterChanged, match=f"from version {'0' * 8} to {version}"):
        store.read("mood", "0" * 8)
    other = publish(store, "mood", contents(2))
    assert store.read("mood", other).contents == contents(2)
    assert store.read("mood").contents == contents(1)
    store.remove("mood", None)
    for call in (store.look, store.read):
        with pytest.raises(VersionNotFound, match=version):
            call("mood", version)


def test_a_version_folder_without_config_does_not_exist(
    store: Store, hands: Hands, contents: Contents
) -> None:
    files = contents()
    version = digest(files)
    hands.put(f"mood/{version}/{WEIGHTS}", files[WEIGHTS])
    assert (store.tasks(), store.versions("mood")) == ([], [])
    hands.folder("mood/notaversion", files)
    hands.folder("mood/DEADBEEF", files)
    assert (store.tasks(), store.versions("mood")) == ([], [])
    hands.put(f"mood/{version}/adapter_config.json", files["adapter_config.json"])
    assert (store.tasks(), store.versions("mood")) == (["mood"], [version])


def test_versions_are_listed_the_oldest_first(store: Store, contents: Contents) -> None:
    made = []
    for number in range(3):
        made.append(publish(store, "mood", contents(number)))
        time.sleep(1.1 if store.url.startswith("s3") else 0.01)  # S3 tells whole seconds
    assert made != sorted(made)
    assert store.versions("mood") == made


NO_NAMES = [
    "../x", "x/../adapter_config.json", "/etc/passwd", "", ".", "adapter_model.bin", "evil.py",
    "publishing.json", "adapter_config.json\0", "Task.json", "archive.zip", "mood/task.json",
]  # fmt: skip


def test_only_an_adapter_s_files_are_staged(store: Store, hands: Hands, contents: Contents) -> None:
    for name in NO_NAMES:
        with pytest.raises(ValueError, match="no file of an adapter"):
            stage(store, {**contents(), name: b"x"})
        with pytest.raises(ValueError, match="no file of an adapter"):
            store.read_file("mood", None, name, 100)
    assert hands.paths() == []


class Endless(io.RawIOBase):
    """A file without an end, that counts what is read of it."""

    num_bytes = 0

    def read(self, size: int = -1) -> bytes:
        assert size > 0
        self.num_bytes += size
        return b" " * size


def test_a_file_is_cut_off_at_its_limit_and_nothing_is_left(
    store: Store, hands: Hands, contents: Contents
) -> None:
    for name, limit in (
        ("task.json", 2**23),
        ("golden.jsonl", 2**20),
        ("adapter_config.json", 2**23),
    ):
        endless = Endless()
        files: dict[str, Any] = {n: io.BytesIO(c) for n, c in contents().items() if n != name}
        with pytest.raises(StagingTooLarge, match=f"{name} is over its limit of {limit} bytes"):
            store.stage({**files, name: endless})
        assert endless.num_bytes == limit + 1
        assert hands.paths() == []
        assert store.unfinished() == []


def test_an_upload_that_breaks_off_leaves_nothing(
    store: Store, hands: Hands, contents: Contents
) -> None:
    class Broken(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise KeyboardInterrupt

    files: dict[str, BinaryIO] = {n: io.BytesIO(c) for n, c in contents().items()}
    with pytest.raises(KeyboardInterrupt):
        store.stage({**files, "task.json": Broken()})
    assert hands.paths() == []
    assert store.unfinished() == []


BROKEN: list[tuple[dict[str, bytes | None], str]] = [
    ({"adapter_config.json": None}, "adapter_config.json is missing"),
    ({WEIGHTS: None}, "adapter_model.safetensors is missing"),
    ({WEIGHTS: b"torn"}, "adapter_model.safetensors has only 4 bytes"),
    ({WEIGHTS: (2**30).to_bytes(8, "little")}, f"has a header of {2**30} bytes"),
]


def test_what_was_staged_broken_is_refused_and_not_waited_for(
    store: Store, contents: Contents
) -> None:
    for changes, sentence in BROKEN:
        files = {n: c for n, c in (contents() | changes).items() if c is not None}
        staging = stage(store, files)
        with pytest.raises(AdapterRefused, match=sentence):
            store.read_staged(staging, "mood")
        with pytest.raises(AdapterRefused, match=sentence):
            store.publish(staging, "mood", "0" * 8)
    assert store.tasks() == []


def test_another_version_than_was_staged_is_not_published(
    store: Store, hands: Hands, contents: Contents
) -> None:
    staging = stage(store, contents())
    before = hands.paths()
    with pytest.raises(AdapterRefused, match=f"uploaded is {digest(contents())}, not 00000000"):
        store.publish(staging, "mood", "0" * 8)
    for task in ("../mood", "catalog", "", "UPPER"):
        with pytest.raises(TaskNotFound):
            store.publish(staging, task, digest(contents()))
        with pytest.raises(TaskNotFound):
            store.read_staged(staging, task)
    assert hands.paths() == before


def test_what_is_no_version_is_no_path(store: Store, hands: Hands, contents: Contents) -> None:
    kept = publish(store, "mood", contents())
    staging = stage(store, contents(2))
    before = hands.paths()
    for version in ("../../x", "", "0" * 7, "0" * 9, "DEADBEEF", "0000000\n", "."):
        for call in (store.look, store.read):
            with pytest.raises(VersionNotFound):
                call("mood", version)
        for change, given in (
            (store.publish, (staging, "mood", version)),
            (store.remove, ("mood", version)),
            (store.read_file, ("mood", version, "task.json", 100)),
        ):
            with pytest.raises(AdapterRefused):
                change(*given)
    assert hands.paths() == before
    assert store.versions("mood") == [kept]


def test_a_staging_that_is_none_is_told_and_nothing_is_removed(
    store: Store, hands: Hands, contents: Contents
) -> None:
    version = hands.folder("mood", contents())
    hands.folder(f".staging/{'a' * 32}/files", contents())
    before = hands.paths()
    for staging in ("../mood", "", ".", "0" * 32, "0" * 31, "..", "F" * 32):
        with pytest.raises(AdapterRefused, match="not there any more"):
            store.read_staged(staging, "mood")
        with pytest.raises(AdapterRefused, match="not there any more"):
            store.publish(staging, "mood", version)
        store.discard(staging)
    assert hands.paths() == before


def test_a_removed_version_is_gone_and_the_others_stay(
    store: Store, hands: Hands, contents: Contents
) -> None:
    hands.folder("mood", {**contents(0), "golden.jsonl": b"", "adapter_model.bin": b"x"})
    one, two = (publish(store, "mood", contents(number)) for number in (1, 2))
    store.remove("mood", one)
    store.remove("mood", one)
    assert (store.versions("mood"), store.tasks()) == ([two], ["mood"])
    hands.put("mood/README.md", b"mine")
    store.remove("mood", None)
    assert (store.versions("mood"), store.tasks()) == ([two], ["mood"])
    store.remove("mood", two)
    assert (store.versions("mood"), store.tasks()) == ([], [])
    assert hands.paths() == ["mood/README.md"]
    store.remove("absent", None)
    store.remove("absent", one)


def test_one_file_is_read_within_a_limit(store: Store, hands: Hands, contents: Contents) -> None:
    version = publish(store, "mood", contents(golden__jsonl=b"12345"))
    hands.folder("mood", contents(golden__jsonl=b"plain"))
    assert store.read_file("mood", version, "golden.jsonl", 5) == b"12345"
    assert store.read_file("mood", None, "golden.jsonl", 5) == b"plain"
    assert store.read_file("mood", version, "task.json", 5) is None
    assert store.read_file("mood", "0" * 8, "golden.jsonl", 5) is None
    assert store.read_file("absent", None, "golden.jsonl", 5) is None
    with pytest.raises(AdapterRefused, match=r"golden\.jsonl is over the limit of 4 bytes"):
        store.read_file("mood", version, "golden.jsonl", 4)


def test_only_old_stagings_are_told_if_asked_for(
    store: Store, hands: Hands, contents: Contents
) -> None:
    staging = stage(store, contents())
    assert store.unfinished() == [(staging, None, None)]
    assert store.unfinished(quiet_s=60) == []
    time.sleep(2.1)
    assert store.unfinished(quiet_s=1) == [(staging, None, None)]


MARKERS = [
    b"", b"{", b"[]", b"null", b'{"task": "mood"}', b"\xff", b" " * 2000,
    b'{"task": "../mood", "version": "00000000"}', b'{"task": "mood", "version": "../00000"}',
    b'{"task": 5, "version": "00000000"}',
]  # fmt: skip


def test_a_marker_that_was_torn_names_nothing(
    store: Store, hands: Hands, contents: Contents
) -> None:
    for marker in MARKERS:
        staging = stage(store, contents())
        hands.put(f".staging/{staging}/publishing.json", marker)
        assert store.unfinished() == [(staging, None, None)]
        store.discard(staging)


def test_a_folder_s_mark_tells_that_something_came_or_went(
    store: Store, hands: Hands, contents: Contents
) -> None:
    assert store.folders() == {}
    hands.folder("mood", contents())
    hands.folder("spam", contents())
    hands.put("catalog/1.json", b"{}")
    first = store.folders()
    assert first.keys() == {"mood", "spam"}
    publish(store, "mood", contents(2))
    second = store.folders()
    assert second["mood"] != first["mood"]
    assert json.loads(json.dumps(second)) == second


def test_a_name_of_a_version_is_used_for_one_task_alone(store: Store, contents: Contents) -> None:
    version = publish(store, "mood", contents())
    with pytest.raises(TaskNotFound):
        store.read("spam", version)
    assert publish(store, "spam", contents()) == version
    store.remove("mood", version)
    assert store.read("spam", version).contents == contents()
