"""How a version comes into a directory: whole or not at all, whenever the process dies."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.directory import Directory
from adapters.errors import AdapterRefused, StoreUnreachable, TaskNotFound
from adapters.store import digest

Contents = Callable[..., dict[str, bytes]]
ROOT = Path(__file__).parents[2]

# Kills itself at the n-th step that touches the disk.
KILLED = """
import os, signal, sys
from adapters.directory import Directory
root, call, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
store, steps = Directory(root), 0
def count(event, arguments):
    global steps
    here = event in ("open", "os.mkdir", "os.rename") and root in str(arguments[0])
    if here or event in ("os.remove", "os.rmdir"):  # whose paths may be relative to a folder
        steps += 1
        if steps == n:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
getattr(store, call)(*sys.argv[4:])
"""


def die(store: Directory, call: str, step: int, *given: str) -> bool:
    """Call a store in a process that is killed at a step; tell whether there was such a step."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(store.root), call, str(step), *given], cwd=ROOT
    )
    assert done.returncode in (0, -signal.SIGKILL)
    return done.returncode != 0


def stage(store: Directory, files: dict[str, bytes]) -> str:
    return store.stage({name: io.BytesIO(content) for name, content in files.items()})


def test_a_publication_that_is_killed_is_whole_or_not_there_and_is_told(
    store: Directory, contents: Contents
) -> None:
    files = contents(golden__jsonl=b"[]")
    version = digest(files)
    seen, step = [], 1
    while True:
        staging = stage(store, files)
        killed = die(store, "publish", step, staging, "mood", version)
        step += 1
        there = store.versions("mood")
        if there:
            assert store.read("mood", version).version == version
            assert store.read_file("mood", version, "golden.jsonl", 9) == b"[]"
            assert store.unfinished() == [(staging, "mood", version)]
        seen.append(bool(there))
        # What the catalog does when it comes back.
        for one, task, found in store.unfinished():
            if task is not None:
                store.remove(task, found)
            store.discard(one)
        assert store.tasks() == []
        assert [path for path in store.root.rglob("*") if path.is_file()] == []
        if not killed:
            break
    assert seen[0] is False
    assert seen[-1] is True
    assert len(seen) > 8


def test_a_removal_that_is_killed_leaves_all_or_nothing(
    store: Directory, contents: Contents
) -> None:
    version, step, seen = digest(contents()), 1, []
    while True:
        staging = stage(store, contents())
        store.publish(staging, "mood", version)
        store.discard(staging)
        killed = die(store, "remove", step, "mood", version)
        step += 1
        there = store.versions("mood")
        if there:
            assert store.read("mood", version).contents == contents()
        seen.append(bool(there))
        store.remove("mood", version)
        for one, _, _ in store.unfinished():
            store.discard(one)
        assert [path for path in store.root.rglob("*") if path.is_file()] == []
        if not killed:
            break
    assert seen[0] is True
    assert seen[-1] is False


def test_files_are_on_the_disk_before_they_are_a_version_and_that_before_it_returns(
    store: Directory, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging, version = stage(store, contents()), digest(contents())
    steps: list[str] = []
    moved: list[str] = []
    sync, rename = os.fsync, Path.rename

    def note_sync(number: int) -> None:
        steps.append(os.path.relpath(os.readlink(f"/proc/self/fd/{number}"), store.root))
        sync(number)

    def note_rename(self: Path, target: Path) -> Path:
        steps.append("rename")
        moved.append(os.path.relpath(self, store.root))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    store.publish(staging, "mood", version)
    at = steps.index("rename")
    place, (folder,) = f".staging/{staging}", moved
    assert set(steps[:at]) >= {
        *(f"{folder}/{name}" for name in contents()),
        folder, f"{place}/publishing.json", place, ".staging",
    }  # fmt: skip
    assert steps[at + 1 :] == ["mood", "."]


def test_a_version_that_cannot_be_moved_in_leaves_nothing_but_its_staging(
    store: Directory, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = stage(store, contents())

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(
            StoreUnreachable, match=r"cannot be written \(No space left on device\)"
        ):
            store.publish(staging, "mood", digest(contents()))
    assert not (store.root / "mood").exists()
    store.publish(staging, "mood", digest(contents()))
    assert store.read("mood", digest(contents())).contents == contents()


def test_no_version_is_put_behind_a_link(
    store: Directory, contents: Contents, tmp_path: Path
) -> None:
    version, outside = digest(contents()), tmp_path / "outside"
    outside.mkdir()
    store.root.mkdir()
    (store.root / "inside").mkdir()
    for target in (outside, store.root / "inside"):
        (store.root / "mood").symlink_to(target)
        staging = stage(store, contents())
        with pytest.raises(AdapterRefused, match="its folder is a link; put a folder in its place"):
            store.publish(staging, "mood", version)
        with pytest.raises(AdapterRefused, match="its folder is a link"):
            store.remove("mood", version)
        store.discard(staging)
        assert list(target.iterdir()) == []
        store.remove("mood", None)  # the link is what the task was
        assert not (store.root / "mood").is_symlink()
        assert target.is_dir()


def test_a_version_that_is_a_link_is_replaced_and_what_it_led_to_stays(
    store: Directory, contents: Contents, tmp_path: Path
) -> None:
    version, outside = digest(contents()), tmp_path / "outside"
    outside.mkdir()
    for name, content in contents().items():
        (outside / name).write_bytes(content)
    (store.root / "mood").mkdir(parents=True)
    (store.root / "mood" / version).symlink_to(outside)
    with pytest.raises(AdapterRefused, match="is a link to outside of the store"):
        store.read("mood", version)
    staging = stage(store, contents())
    store.publish(staging, "mood", version)
    store.discard(staging)
    assert not (store.root / "mood" / version).is_symlink()
    assert store.read("mood", version).contents == contents()
    store.remove("mood", version)
    (store.root / "mood").mkdir()
    (store.root / "mood" / version).symlink_to(outside)
    store.remove("mood", version)
    assert sorted(path.name for path in outside.iterdir()) == sorted(contents())
    assert not (store.root / "mood").exists()


def test_a_staging_place_that_is_a_link_is_not_written_to(
    store: Directory, contents: Contents, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (outside / ("a" * 32) / "files").mkdir(parents=True)
    (outside / ("a" * 32) / "files" / "adapter_config.json").write_bytes(b"{}")
    before = sorted(outside.rglob("*"))
    store.root.mkdir()
    (store.root / ".staging").symlink_to(outside)
    with pytest.raises(StoreUnreachable, match=r"\.staging is a link; make it a folder"):
        stage(store, contents())
    store.discard("a" * 32)
    assert store.unfinished() == []
    assert sorted(outside.rglob("*")) == before


def test_a_staging_that_is_a_link_is_none(
    store: Directory, contents: Contents, tmp_path: Path
) -> None:
    stage(store, contents())
    outside = tmp_path / "outside" / "files"
    outside.mkdir(parents=True)
    for name, content in contents().items():
        (outside / name).write_bytes(content)
    (store.root / ".staging" / ("b" * 32)).symlink_to(outside.parent)
    with pytest.raises(AdapterRefused, match="not there any more"):
        store.publish("b" * 32, "mood", digest(contents()))
    store.discard("b" * 32)
    assert len(list(outside.iterdir())) == len(contents())


def test_a_link_that_was_put_into_a_plain_folder_is_removed_and_not_followed(
    store: Directory, contents: Contents, tmp_path: Path
) -> None:
    outside = tmp_path / "outside.json"
    outside.write_bytes(b"{}")
    (store.root / "mood").mkdir(parents=True)
    (store.root / "mood" / "adapter_config.json").symlink_to(outside)
    (store.root / "mood" / "tokenizer.json").mkdir()
    store.remove("mood", None)
    assert outside.read_bytes() == b"{}"
    assert store.tasks() == []


def test_a_store_that_cannot_be_written_says_so(
    contents: Contents, tmp_path: Path, store: Directory
) -> None:
    store.root.mkdir()
    (store.root / ".staging").write_bytes(b"in the way")
    with pytest.raises(StoreUnreachable, match="cannot be written"):
        stage(store, contents())
    assert list(store.root.iterdir()) == [store.root / ".staging"]


def test_a_directory_keeps_nothing_on_another_disk(store: Directory) -> None:
    store.forget("mood", "0" * 8)
    assert store.on_disk() == set()


def test_a_read_beside_a_publication_sees_no_half(store: Directory, contents: Contents) -> None:
    version = digest(contents())
    code = (
        "import sys; from adapters.directory import Directory; from adapters.errors import *\n"
        "store, seen = Directory(sys.argv[1]), 0\n"
        "print('ready', flush=True)\n"
        "while not (found := store.versions('mood')): pass\n"
        "print(store.read('mood', found[0]).version)\n"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", code, str(store.root)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"
    with pytest.raises(TaskNotFound):
        store.read("mood", version)
    store.publish(stage(store, contents()), "mood", version)
    assert reader.communicate(timeout=60)[0].strip() == version
    assert reader.returncode == 0
