"""Where adapters lie: a directory with one PEFT folder a task. No torch.

Whoever writes the store may link within it; what a link has outside of it is never opened.
A folder may change at any time, and may still be on its way in. So it is looked at (names, sizes
and times) before it is read, and what was read is named by its content.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG, S_ISSOCK
from typing import BinaryIO

from adapters.errors import (
    TASK_NAME,
    AdapterIncomplete,
    AdapterRefused,
    TaskNotFound,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
RULES = "task.json"
MODEL_CONFIG = "config.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
# Only these are ever opened: a training folder holds optimizer states and pickles beside them.
READ = (CONFIG, WEIGHTS, MODEL_CONFIG, RULES, *TOKENIZER)
VERSIONED = frozenset((CONFIG, WEIGHTS, *TOKENIZER))

MAX_JSON_BYTES = 8 * 2**20  # parsed, JSON takes 30 times its size at worst
MAX_TOKENIZER_BYTES = 64 * 2**20
MAX_WEIGHTS_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True)
class Look:
    """A folder as `stat` shows it; two equal looks mean an unchanged folder.

    Attributes:
        entries: Sorted (name, bytes, mtime in ns) of every file that could be read.
        changed_s: When the youngest of them last changed, in seconds since the epoch; in the
            future if the store's clock is ahead.
    """

    entries: tuple[tuple[str, int, int], ...]
    changed_s: float


@dataclass(frozen=True, slots=True)
class Files:
    """The content of one adapter folder.

    Attributes:
        task: The folder's name.
        version: First 8 hex digits of a SHA-256 over name, length and bytes of the adapter's
            config, weights and tokenizer files. The rules have no part in it.
        contents: File name -> bytes, of those in `READ` that exist.
    """

    task: str
    version: str
    contents: Mapping[str, bytes]


class Store:
    """A directory of PEFT folders, one a task, exactly as `save_pretrained` writes them."""

    def __init__(self, root: str | Path) -> None:
        """Take the directory; it may be empty, and need not exist yet."""
        self.root = Path(root)

    def tasks(self) -> list[str]:
        """Return the names of all folders that hold an adapter, sorted."""
        try:
            entries = os.scandir(self.root)
        except (FileNotFoundError, NotADirectoryError):
            return []
        with entries:
            names = [entry.name for entry in entries if TASK_NAME.fullmatch(entry.name)]
        # False for a folder that we may not read, too.
        return sorted(name for name in names if os.path.isfile(f"{self.root}/{name}/{CONFIG}"))

    def look(self, task: str) -> Look:
        """Return what `stat` says of a task's folder.

        Raises:
            TaskNotFound: The name is not a task's, or the folder has no adapter_config.json.
            AdapterRefused: Something in it is no file, or lies outside the store.
        """
        folder = str(self._folder(task))
        root, problems = os.path.realpath(self.root), list[str]()
        inside = _is_inside(os.path.realpath(folder), root)
        entries, changed_s = [], 0.0
        # Strings, not Paths, of which this would make dozens with every request in need of a look.
        for name in (*READ, PICKLE):
            path = f"{folder}/{name}"
            try:
                stat = os.stat(path)
            except OSError:
                continue
            if name != PICKLE:
                problems += _place_problem(path, stat.st_mode, root, inside)
            entries.append((name, stat.st_size, stat.st_mtime_ns))
            # A copy that keeps the times of its files still moves the change time.
            changed_s = max(changed_s, stat.st_mtime, stat.st_ctime)
        if problems:
            raise AdapterRefused(task, problems)
        if not any(name == CONFIG for name, _, _ in entries):
            raise TaskNotFound(task)
        return Look(tuple(sorted(entries)), changed_s)

    def read(self, task: str) -> Files:
        """Read a task's folder whole.

        Raises:
            TaskNotFound: As `look`.
            AdapterIncomplete: The weights are not there yet, or not all of them; or a file cannot
                be read.
            AdapterRefused: As `look`; or the folder has only a pickle, or a file of absurd size.
        """
        folder = self._folder(task)
        before = self.look(task)
        sizes = {name: size for name, size, _ in before.entries}
        if WEIGHTS not in sizes:
            if PICKLE in sizes:
                raise AdapterRefused(
                    task,
                    [
                        f"it has only {PICKLE}, a pickle, which is never opened; "
                        "save it again with safe_serialization=True"
                    ],
                )
            raise AdapterIncomplete(task, f"{WEIGHTS} is missing")
        problems = [
            f"{name} has {size} bytes, over the limit of {limit}"
            for name, size in sizes.items()
            if size > (limit := _limit(name))
        ]
        if problems:
            raise AdapterRefused(task, problems)
        try:
            _check_length(task, folder / WEIGHTS)
            contents = {name: _read(folder / name) for name in READ if name in sizes}
        except OSError as error:
            name = Path(error.filename or WEIGHTS).name
            raise AdapterIncomplete(task, f"{name} cannot be read ({error.strerror})") from None
        if self.look(task).entries != before.entries:
            raise AdapterIncomplete(task, "its folder changed while it was read")
        return Files(task, _version(contents), contents)

    def _folder(self, task: str) -> Path:
        if not TASK_NAME.fullmatch(task):
            raise TaskNotFound(task)
        return self.root / task


def _place_problem(path: str, mode: int, root: str, inside: bool) -> list[str]:
    """Say if a path that exists is no file (a pipe would never end), or leads out of the root."""
    name = os.path.basename(path)
    if not S_ISREG(mode):
        return [f"{name} is a {_kind(mode)}, not a file"]
    if _is_inside(os.path.realpath(path), root) if os.path.islink(path) else inside:
        return []
    return [f"{name} is a link to outside of the store; copy it into the store"]


def _is_inside(path: str, root: str) -> bool:
    """Tell whether a path, links resolved, lies below a folder."""
    return path.startswith(root.rstrip(os.sep) + os.sep)


def _limit(name: str) -> int:
    """Return the most bytes that a file of this name may have."""
    if name == WEIGHTS:
        return MAX_WEIGHTS_BYTES
    return MAX_TOKENIZER_BYTES if name in TOKENIZER else MAX_JSON_BYTES


def _kind(mode: int) -> str:
    return "folder" if S_ISDIR(mode) else "socket" if S_ISSOCK(mode) else "pipe or device"


def _open(path: Path) -> BinaryIO:
    """Open a file for reading, without waiting for anybody if it has just become a pipe."""
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: SIM115
    if not S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return file


def _read(path: Path) -> bytes:
    """Read a file whole, or of one that is over its limit just enough to see that."""
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        return file.read(min(size, _limit(path.name)) + 1)


def _check_length(task: str, path: Path) -> None:
    """Compare a safetensors file's length with the one that its header declares."""
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or size < 8 + length <= MAX_JSON_BYTES:
            raise AdapterIncomplete(task, f"{WEIGHTS} has only {size} bytes")
        if 8 + length > MAX_JSON_BYTES:
            raise AdapterRefused(task, [f"{WEIGHTS} has a header of {length} bytes"])
        # At most as many digits as a file has: Python refuses to read thousands of them.
        offsets = rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d{1,19})\s*\]'
        ends = re.findall(offsets, file.read(length))
    declared = 8 + length + max((int(end) for end in ends), default=0)
    if declared > MAX_WEIGHTS_BYTES:
        raise AdapterRefused(
            task, [f"{WEIGHTS} declares {declared} bytes, over the limit of {MAX_WEIGHTS_BYTES}"]
        )
    if size < declared:
        raise AdapterIncomplete(task, f"{WEIGHTS} has {size} of {declared} bytes")


def _version(contents: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(VERSIONED & contents.keys()):
        digest.update(f"{name}\0{len(contents[name])}\0".encode())
        digest.update(contents[name])
    return digest.hexdigest()[:8]
