import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.disk import Disk, default_folder
from adapters.errors import AdapterRefused, TaskNotFound
from adapters.store import Files, Look, digest

Contents = Callable[..., dict[str, bytes]]
Make = Callable[..., Files]
URL = "s3://bucket/s"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def disk(root: Path) -> Disk:
    return Disk(root, URL, 2**20)


@pytest.fixture
def make(contents: Contents) -> Make:
    def make(task: str = "mood", number: int = 1, **files: bytes) -> Files:
        found = contents(number, **files)
        return Files(task, digest(found), found)

    return make


def look(files: Files, mark: int = 1) -> Look:
    return Look(tuple(sorted((n, len(c), mark) for n, c in files.contents.items())), 5.0)


def put(disk: Disk, files: Files) -> Files:
    disk.put(files, look(files))
    return files


def test_what_was_put_is_read_and_by_other_processes_of_the_machine_too(
    disk: Disk, root: Path, make: Make
) -> None:
    files = put(disk, make(task__json=b"{}"))
    for one in (disk, Disk(root, URL, 2**20)):
        assert one.held() == {("mood", files.version)}
        assert one.read("mood", files.version) == files
        assert one.read("mood", files.version, look(files)) == files
        assert one.look("mood", files.version) == look(files)
        assert one.read("mood", "0" * 8) is one.look("mood", "0" * 8) is None
    assert Disk(root, "s3://bucket/other", 2**20).held() == set()


def test_the_folder_is_ours_alone(root: Path, disk: Disk, tmp_path: Path) -> None:
    assert root.stat().st_mode & 0o777 == 0o700
    assert default_folder().name == f"onebase-{os.getuid()}"
    open_, link, file = tmp_path / "open", tmp_path / "link", tmp_path / "file"
    open_.mkdir()
    open_.chmod(0o777)
    link.symlink_to(root)
    file.write_bytes(b"")
    for path in (open_, link, file):
        with pytest.raises(ValueError, match="belongs to this user and that nobody else can write"):
            Disk(path, URL, 2**20)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives folders away")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(ValueError, match="belongs to this user"):
        Disk(tmp_path / "theirs", URL, 2**20)


def test_the_least_recently_used_go_when_the_budget_is_full(root: Path, make: Make) -> None:
    padding = b" " * 1000
    num_bytes = sum(map(len, make(tokenizer__json=padding).contents.values()))
    disk, other = (Disk(root, url, int(3.9 * num_bytes)) for url in (URL, "s3://bucket/other"))
    made = [put(disk, make(number=n, tokenizer__json=padding)) for n in range(2)]
    made.append(put(other, make(number=2, tokenizer__json=padding)))
    time.sleep(0.2)  # until it is counted what others have put here
    assert disk.read("mood", made[0].version) == made[0]
    put(disk, make(number=3, tokenizer__json=padding))
    assert disk.held() == {("mood", made[0].version), ("mood", make(
        number=3, tokenizer__json=padding).version)}  # fmt: skip
    assert other.held() == {("mood", made[2].version)}  # one budget for all stores
    put(disk, make(number=4, tokenizer__json=padding))
    assert other.held() == set()
    assert len(disk.held()) == 3


def test_what_is_over_the_whole_budget_is_not_kept_and_nobody_goes_for_it(
    disk: Disk, make: Make
) -> None:
    kept = put(disk, make())
    put(disk, make(number=2, tokenizer__json=b" " * 2**20))
    assert disk.held() == {("mood", kept.version)}


BREAK: dict[str, Callable[[Path], object]] = {
    "weights": lambda place: (place / WEIGHTS).write_bytes(b"\1" * 300),
    "one bit": lambda place: (place / WEIGHTS).write_bytes(
        (place / WEIGHTS).read_bytes()[:-1] + b"\1"
    ),
    "rules": lambda place: (place / "task.json").write_bytes(b"[]"),
    "no rules": lambda place: (place / "task.json").unlink(),
    "more files": lambda place: (place / "config.json").write_bytes(b"{}"),
    "no config": lambda place: (place / "adapter_config.json").unlink(),
    "no weights": lambda place: (place / WEIGHTS).unlink(),
    "no entry": lambda place: (place / "entry.json").unlink(),
    "torn entry": lambda place: (place / "entry.json").write_bytes(b'{"entries": [[1'),
    "odd entry": lambda place: (place / "entry.json").write_bytes(b"[]"),
    "a pipe": lambda place: ((place / "task.json").unlink(), os.mkfifo(place / "task.json")),
    "a link out": lambda place: (
        (place / "task.json").rename(place.parents[2] / "moved"),
        (place / "task.json").symlink_to(place.parents[2] / "moved"),
    ),
}


@pytest.mark.parametrize("name", BREAK)
def test_what_is_damaged_is_dropped_and_said(
    disk: Disk, root: Path, make: Make, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    files = put(disk, make(task__json=b"{}"))
    other = put(disk, make("spam"))
    (place,) = root.glob("*/mood@*")
    BREAK[name](place)
    assert disk.read("mood", files.version, look(files)) is None
    assert f"adapter=mood@{files.version} is damaged in the disk cache" in caplog.text
    assert disk.held() == {("spam", other.version)}
    assert disk.read("mood", files.version) is None
    assert len(caplog.messages) == 1
    put(disk, files)
    assert disk.read("mood", files.version, look(files)) == files


def test_what_the_store_has_otherwise_is_dropped_without_a_word(
    disk: Disk, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    files = put(disk, make())
    assert disk.read("mood", files.version, look(files, mark=2)) is None
    assert disk.held() == set()
    assert not caplog.messages


def test_a_version_put_again_is_there_once(disk: Disk, root: Path, make: Make) -> None:
    put(disk, make(task__json=b"1"))
    files = put(disk, make(task__json=b"2"))
    assert disk.read("mood", files.version) == files
    assert len(list(root.glob("*/*"))) == 1


def test_a_forgotten_version_takes_no_room(disk: Disk, root: Path, make: Make) -> None:
    files = put(disk, make())
    disk.forget("mood", files.version)
    disk.forget("mood", files.version)
    assert list(root.glob("*/*")) == []


def test_names_that_are_none_are_no_paths(disk: Disk, root: Path) -> None:
    for call in (disk.read, disk.look, disk.forget):
        with pytest.raises(TaskNotFound):
            call("../mood", "0" * 8)
        with pytest.raises(AdapterRefused):
            call("mood", "../../0")


def test_a_disk_that_is_full_is_no_failure(
    disk: Disk, root: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    put(disk, make())
    (store,) = root.iterdir()
    for path in list(store.iterdir()):
        disk.forget(*path.name.split("@"))
    store.rmdir()
    store.write_bytes(b"in the way")  # nothing can be written below it
    put(disk, make())
    assert "cannot be written" in caplog.text
    assert disk.held() == set()


def test_what_a_dead_writer_left_is_removed_in_time(disk: Disk, root: Path, make: Make) -> None:
    put(disk, make())
    (store,) = root.iterdir()
    for name, age_s in ((".young", 60), (".old", 7200)):
        (store / name).mkdir()
        os.utime(store / name, (time.time() - age_s,) * 2)
    put(disk, make("spam"))
    assert sorted(p.name for p in store.iterdir() if p.name.startswith(".")) == [".young"]


def test_readers_beside_writers_get_all_or_nothing(root: Path, make: Make) -> None:
    made = [make(number=n, tokenizer__json=b" " * 2000) for n in range(4)]
    num_bytes = sum(map(len, made[0].contents.values()))
    problems: list[str] = []

    def work(number: int) -> None:
        disk = Disk(root, URL, 2 * num_bytes + 1500)
        for n in range(60):
            files = made[(number + n) % 4]
            found = disk.read("mood", files.version)
            if found is None:
                put(disk, files)
            elif found != files:
                problems.append(json.dumps(sorted(found.contents)))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    put(Disk(root, URL, 2 * num_bytes + 1500), made[0])
    used = sum(p.stat().st_size for p in root.glob("*/*@*/*"))
    assert used <= 2 * num_bytes + 1500
    assert not list(root.glob("*/.*"))
