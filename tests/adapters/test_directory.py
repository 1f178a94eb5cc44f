import contextlib
import hashlib
import os
import pickle
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.directory import Directory
from adapters.errors import AdapterIncomplete, AdapterRefused, TaskNotFound
from adapters.folder import look
from adapters.store import Look

Write = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"


class Bomb:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_the_version_is_a_digest_of_name_length_and_content(write: Write, store: Directory) -> None:
    folder = write(tokenizer__json={"model": 1}, config__json={"id2label": {"0": "a"}})
    digest = hashlib.sha256()
    for name in ("adapter_config.json", WEIGHTS, "tokenizer.json"):
        content = (folder / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    files = store.read("mood")
    assert files.version == digest.hexdigest()[:8]
    assert files.task == "mood"
    assert set(files.contents) == {
        "adapter_config.json", WEIGHTS, "tokenizer.json", "config.json",
    }  # fmt: skip
    assert files.contents[WEIGHTS] == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", ["task.json", "config.json", "README.md"])
def test_rules_and_labels_are_no_part_of_the_version(
    write: Write, store: Directory, name: str
) -> None:
    folder = write()
    before = store.read("mood").version
    (folder / name).write_text('{"threshold": 0.5}')
    assert store.read("mood").version == before


@pytest.mark.parametrize("name", ["adapter_config.json", "tokenizer.json", "vocab.txt"])
def test_what_changes_an_answer_changes_the_version(
    write: Write, store: Directory, name: str
) -> None:
    folder = write()
    before = store.read("mood").version
    (folder / name).write_text("{}")
    assert store.read("mood").version != before


def test_weights_change_the_version_and_a_copy_does_not(
    write: Write, store: Directory, tensors: dict[str, torch.Tensor]
) -> None:
    write("one")
    write("same")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1e-6
    write("other")
    versions = [store.read(task).version for task in ("one", "same", "other")]
    assert versions[0] == versions[1] != versions[2]


@pytest.mark.parametrize(
    "name",
    ["../mood", "..", ".", "", "UPPER", "mood/../mood", "/etc", "a b", ".hidden", "-x", "mood\n",
     "mood\0", "ünïcode", "a" * 65, "a\\b", "~", "%2e%2e"],
)  # fmt: skip
def test_what_is_no_task_name_is_no_task(write: Write, store: Directory, name: str) -> None:
    write()
    for call in (store.look, store.read):
        with pytest.raises(TaskNotFound):
            call(name)


@pytest.mark.parametrize("name", ["a", "0", "mood.v2", "mood-2_x", "a" * 64])
def test_what_is_a_task_name_is_served(write: Write, store: Directory, name: str) -> None:
    write(name)
    assert store.tasks() == [name]
    assert store.read(name).task == name


def test_the_list_has_folders_with_an_adapter_only(write: Write, store: Directory) -> None:
    assert store.tasks() == []  # the root is not there yet
    for task in ("spam", "mood", "UPPER"):
        write(task)
    (store.root / "empty").mkdir()
    (store.root / "file").write_text("x")
    (store.root / ".git").mkdir()
    assert store.tasks() == ["mood", "spam"]


def test_a_folder_without_config_or_of_another_kind_is_not_found(
    write: Write, store: Directory
) -> None:
    write("bare", adapter_config__json=None)
    (store.root / "file").write_text("x")
    for task in ("bare", "file", "absent"):
        for call in (store.look, store.read):
            with pytest.raises(TaskNotFound):
                call(task)


def test_weights_that_are_not_there_yet_are_waited_for(write: Write, store: Directory) -> None:
    write(adapter_model__safetensors=None)
    with pytest.raises(AdapterIncomplete, match="safetensors is missing"):
        store.read("mood")


def test_weights_cut_anywhere_are_incomplete(write: Write, store: Directory) -> None:
    path = write() / WEIGHTS
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 9), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(AdapterIncomplete):
            store.read("mood")
    path.write_bytes(whole)
    store.read("mood")


@pytest.mark.parametrize("length", [2**26 + 1, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_absurd_length_is_refused_unread(
    write: Write, store: Directory, length: int
) -> None:
    write(adapter_model__safetensors=length.to_bytes(8, "little") + b"{}")
    with pytest.raises(AdapterRefused, match=f"header of {length} bytes"):
        store.read("mood")


def test_an_offset_of_absurd_length_is_incomplete_or_left_to_the_reader(
    write: Write, store: Directory
) -> None:
    digits = b"9" * 5000  # more than Python turns into an int
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,' + digits + b"]}}"
    write(adapter_model__safetensors=len(header).to_bytes(8, "little") + header)
    with contextlib.suppress(AdapterIncomplete):
        assert WEIGHTS in store.read("mood").contents


@pytest.mark.parametrize(
    ("name", "size"), [(WEIGHTS, 2**32 + 1), ("tokenizer.json", 2**26 + 1), ("task.json", 2**27)]
)
def test_a_file_of_absurd_size_is_refused_unread(
    write: Write, store: Directory, opened: list[str], name: str, size: int
) -> None:
    folder = write()
    with open(folder / name, "ab") as file:
        file.truncate(size)  # sparse: it takes no room
    opened.clear()
    with pytest.raises(AdapterRefused, match=f"{name} has {size} bytes, over the limit"):
        store.read("mood")
    assert not opened


def test_a_pickle_alone_is_refused_and_never_opened(
    write: Write, store: Directory, tmp_path: Path, opened: list[str]
) -> None:
    mark = tmp_path / "opened"
    write(adapter_model__safetensors=None, adapter_model__bin=pickle.dumps(Bomb(mark)))
    opened.clear()
    store.look("mood")
    with pytest.raises(AdapterRefused, match=r"only adapter_model\.bin, a pickle"):
        store.read("mood")
    store.tasks()
    assert not [path for path in opened if path.endswith(".bin")]
    assert not mark.exists()


def test_nothing_else_of_a_training_folder_is_ever_opened(
    write: Write, store: Directory, tmp_path: Path, opened: list[str]
) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "opened"))
    training = (
        "optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "adapter_model.bin",
        "trainer_state.json", "model.safetensors", "README.md", "tokenizer.model", "evil.py",
    )  # fmt: skip
    folder = write(task__json={}, tokenizer__json={}, **dict.fromkeys(training, bomb))
    (folder / "checkpoint-10").mkdir()
    opened.clear()
    store.tasks()
    store.look("mood")
    files = store.read("mood")
    assert {Path(path).name for path in opened} == set(files.contents)
    assert set(files.contents) == {"adapter_config.json", WEIGHTS, "task.json", "tokenizer.json"}


def test_links_that_stay_in_the_store_are_served(
    write: Write, store: Directory, tmp_path: Path
) -> None:
    real = write("v1")
    (store.root / "mood").symlink_to("v1")
    hub = store.root / "hub"  # as the Hugging Face cache lays its snapshots
    hub.mkdir()
    for name in ("adapter_config.json", WEIGHTS):
        (hub / name).symlink_to(real / name)
    (store.root / "dangling").symlink_to(tmp_path / "nowhere")
    (store.root / "loop").symlink_to("loop")
    assert store.tasks() == ["hub", "mood", "v1"]
    assert store.read("mood").version == store.read("hub").version
    assert [name for name, _, _ in store.look("mood").entries] == ["adapter_config.json", WEIGHTS]
    for task in ("dangling", "loop"):
        with pytest.raises(TaskNotFound):
            store.look(task)
    (tmp_path / "linked").symlink_to(store.root)  # the store itself may be a link
    assert Directory(tmp_path / "linked").read("hub").version == store.read("mood").version


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS, "tokenizer.json", None])
def test_a_link_out_of_the_store_is_refused_unread_until_it_is_a_copy(
    write: Write, store: Directory, tmp_path: Path, opened: list[str], name: str | None
) -> None:
    folder = write(tokenizer__json={})
    path = folder / name if name else folder
    outside = tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    opened.clear()
    for call in (store.look, store.read):
        with pytest.raises(AdapterRefused) as caught:
            call("mood")
        assert f"{name or WEIGHTS} is a link to outside of the store" in str(caught.value)
    assert not opened
    assert store.tasks() == ["mood"]  # so that the listing says why
    path.unlink()
    outside.rename(path)
    assert store.read("mood").version


def test_a_link_turned_to_another_folder_is_seen(
    write: Write, store: Directory, tmp_path: Path
) -> None:
    write("v1")
    write("v2", adapter_config__json={"r": 1})
    link = store.root / "mood"
    link.symlink_to("v1")
    before = store.look("mood")
    (tmp_path / "link").symlink_to(store.root / "v2")
    (tmp_path / "link").rename(link)
    assert store.look("mood") != before


def test_two_looks_at_an_unchanged_folder_are_equal(write: Write, store: Directory) -> None:
    write(task__json={})
    before = store.look("mood")
    time.sleep(0.01)
    store.read("mood")
    (store.root / "mood" / "notes.txt").write_text("not ours")
    assert store.look("mood") == before


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS, "task.json", "tokenizer.json"])
def test_a_change_of_what_is_read_changes_the_look(
    write: Write, store: Directory, name: str
) -> None:
    folder = write(task__json={"threshold": 0.5})
    before = store.look("mood")
    (folder / name).write_bytes(b"changed")
    assert store.look("mood") != before


def test_a_copy_that_keeps_file_times_counts_as_a_change_now(
    write: Write, store: Directory
) -> None:
    folder = write()
    for name in ("adapter_config.json", WEIGHTS):
        os.utime(folder / name, (1e9, 1e9))
    assert time.time() - store.look("mood").changed_s < 5


def test_times_in_the_future_do_not_make_a_folder_change_at_every_look(
    write: Write, store: Directory
) -> None:
    folder = write()
    os.utime(folder / WEIGHTS, (time.time() + 3600,) * 2)
    before = store.look("mood")
    time.sleep(0.01)
    assert store.look("mood") == before


def test_a_file_that_goes_away_while_it_is_read_is_no_crash(
    write: Write, store: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write()
    look = store.look("mood")
    (folder / WEIGHTS).unlink()
    monkeypatch.setattr("adapters.folder.look", lambda *_: look)  # it was there a moment ago
    with pytest.raises(AdapterIncomplete, match=WEIGHTS):
        store.read("mood")


MAKE = {
    "folder": Path.mkdir,
    "pipe or device": os.mkfifo,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path)),
}


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS, "tokenizer.json"])
@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_what_is_no_file_is_refused_and_not_waited_for(
    write: Write, store: Directory, kind: str, name: str
) -> None:
    folder = write(**{name: None})
    (folder / name).unlink(missing_ok=True)
    MAKE[kind](folder / name)
    for call in (store.look, store.read):
        with pytest.raises(AdapterRefused) as caught:
            call("mood")
        assert caught.value.problems == (f"{name} is a {kind}, not a file",)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_a_file_that_becomes_a_pipe_while_it_is_read_is_not_waited_for(
    write: Write, store: Directory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = write()
    look = store.look("mood")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    monkeypatch.setattr("adapters.folder.look", lambda *_: look)  # it was a file a moment ago
    with pytest.raises(AdapterIncomplete, match="it is no file"):
        store.read("mood")


def test_a_file_that_grows_while_it_is_read_is_not_read_without_end(
    write: Write, store: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tokenizer__json=b"{}") / "tokenizer.json"
    looks: list[int] = []

    def look_and_grow(*given: Any) -> Look:
        before = look(*given)
        if not looks:
            with path.open("ab") as file:
                file.truncate(2**35)  # sparse: it takes no room
        looks.append(len(looks))
        return before

    monkeypatch.setattr("adapters.folder.look", look_and_grow)
    with pytest.raises(AdapterIncomplete, match="changed while it was read"):
        store.read("mood")


def test_weights_that_declare_an_absurd_size_are_refused(write: Write, store: Directory) -> None:
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,1152921504606846976]}}'
    write(adapter_model__safetensors=len(header).to_bytes(8, "little") + header)
    with pytest.raises(AdapterRefused, match="declares 1152921504606847056 bytes, over the limit"):
        store.read("mood")


@pytest.mark.parametrize("is_old", [False, True])
def test_a_mark_tells_of_every_way_to_change_a_folder(
    write: Write, store: Directory, is_old: bool
) -> None:
    folder = write()

    def copied_with_its_times(name: str) -> None:
        before = (folder / name).stat()
        (folder / name).write_bytes((folder / name).read_bytes()[::-1])
        os.utime(folder / name, ns=(before.st_atime_ns, before.st_mtime_ns))

    changes: list[Callable[[], Any]] = [
        lambda: (folder / WEIGHTS).write_bytes(b"in its place"),
        lambda: copied_with_its_times("adapter_config.json"),
        lambda: (folder / "task.json").write_text("{}"),
        lambda: (folder / "task.json").unlink(),
        lambda: (folder / "0123abcd").mkdir(),
        lambda: (folder / "0123abcd" / "adapter_config.json").write_text("{}"),
        lambda: (folder / WEIGHTS).unlink(),
    ]
    for change in changes:
        if is_old:  # so that its names are known from one look to the next
            os.utime(folder, (0, time.time() - 3600))
        seen = [store.folders() for _ in range(3)]
        assert seen[0] == seen[1] == seen[2]
        change()
        assert store.folders()["mood"] != seen[0]["mood"]
