"""Where adapters lie: what a store promises, whatever it is made of. No torch.

    {task}/…                    a plain PEFT folder, as `save_pretrained` writes it
    {task}/{version}/…          a version, named by its content and never changed
    .staging/{id}/files/…       what is on its way in; beside it the marker of a publication
    catalog/…                   the catalog's own

A plain folder may change at any time, and may still be on its way in. So it is looked at (names,
sizes and times) before it is read, and what was read is named by its content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
RULES = "task.json"
MODEL_CONFIG = "config.json"
GOLDEN = "golden.jsonl"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
# Only these are ever opened: a training folder holds optimizer states and pickles beside them.
READ = (CONFIG, WEIGHTS, MODEL_CONFIG, RULES, GOLDEN, *TOKENIZER)
VERSIONED = frozenset((CONFIG, WEIGHTS, *TOKENIZER))

MAX_JSON_BYTES = 8 * 2**20  # parsed, JSON takes 30 times its size at worst
MAX_GOLDEN_BYTES = 2**20
MAX_TOKENIZER_BYTES = 64 * 2**20
MAX_WEIGHTS_BYTES = 4 * 2**30
MAX_CACHE_BYTES = 10 * 2**30


@dataclass(frozen=True, slots=True)
class Look:
    """A folder as a listing shows it; two equal looks mean an unchanged folder.

    Attributes:
        entries: Sorted (name, bytes, mark) of every file that could be read. The mark is the mtime
            in ns, or in an object store a number made of the object's etag and time.
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
        version: The `digest` of its contents. The rules have no part in it.
        contents: File name -> bytes, of those in `READ` that exist.
    """

    task: str
    version: str
    contents: Mapping[str, bytes]


class Store(Protocol):
    """A store of adapters. Every call blocks, on the network if the store is there.

    Raises of all calls: TaskNotFound if `task` is no task's name; StoreUnreachable if the store
    cannot be listed or written.
    """

    @property
    def url(self) -> str:
        """What it was opened by."""

    def tasks(self) -> list[str]:
        """Return the names of all tasks that have a plain folder or a version, sorted."""

    def folders(self) -> dict[str, int]:
        """Return the folder of every possible task -> a mark.

        Another mark says that in the folder a file may have changed, come or gone, or a version
        folder. It costs little for each: thousands of folders are asked for every second.
        """

    def versions(self, task: str) -> list[str]:
        """Return the names of a task's version folders, the oldest change first."""

    def look(self, task: str, version: str | None = None) -> Look:
        """Return what a listing says of the folder that `read` would read.

        Raises:
            TaskNotFound: The task has no plain folder (with `version`: nor any version).
            VersionNotFound: The task has neither that version nor a plain folder.
            AdapterRefused: Something in the folder is no file, or lies outside the store.
            AdapterIncomplete: The store does not answer.
        """

    def read(self, task: str, version: str | None = None) -> Files:
        """Read a task's plain folder whole, or one version.

        A version is its own folder, or the plain folder if that holds just this version.

        Raises:
            TaskNotFound: As `look`.
            VersionNotFound: As `look`.
            AdapterIncomplete: The weights are not there yet, or not all of them; or a file cannot
                be read.
            AdapterChanged: The version has no folder, and the plain folder holds another one.
            AdapterRefused: As `look`; the folder has only a pickle, or a file of absurd size; or a
                version folder does not hold what its name says.
        """

    def read_file(self, task: str, version: str | None, name: str, max_bytes: int) -> bytes | None:
        """Read one file of a version folder, or of the plain one; None if it is not there.

        Args:
            task: The task.
            version: The version, None for the plain folder.
            name: One of `READ`.
            max_bytes: Its limit.

        Raises:
            AdapterRefused: It is over the limit, no file, or outside the store.
            AdapterIncomplete: It cannot be read.
        """

    def stage(self, files: Mapping[str, BinaryIO]) -> str:
        """Take files in, for nobody to see yet; on any error nothing of them is left.

        Args:
            files: Name -> what it is read from, each until its end or its limit.

        Returns:
            The staging's id, 32 hex digits.

        Raises:
            ValueError: A name is not in `READ`.
            StagingTooLarge: A file is over its limit; it was read no further.
        """

    def read_staged(self, staging: str, task: str) -> Files:
        """Read what was staged, as `read` would if it were a version of the task.

        Raises:
            AdapterRefused: It cannot be read; nothing more is on its way, so waiting is no use.
        """

    def publish(self, staging: str, task: str, version: str) -> bool:
        """Make what was staged a version, at once and whole; durable when this returns.

        The staging stays. A version that is there already is kept, unless its folder does not hold
        what its name says. A marker beside the staging names the version until
        `discard`, so that whoever finds it knows whose publication died.

        Returns:
            Whether this has made the version's folder; False if it was there.

        Raises:
            AdapterRefused: What was staged is not that version; or the task's folder is a link.
        """

    def discard(self, staging: str) -> None:
        """Remove a staging and its marker, if it is there."""

    def unfinished(self, quiet_s: float = 0.0) -> list[tuple[str, str | None, str | None]]:
        """Return the stagings that there are.

        Args:
            quiet_s: Only those in which nothing changed for so long, whose process may be taken
                for dead: any ingress may stage, and so may another cluster on the same store.

        Returns:
            (staging, task, version) each; both None for one that was not being published.
        """

    def remove(self, task: str, version: str | None) -> None:
        """Remove a version folder, or with None the plain folder's files, if they are there.

        Files that no store reads stay in a plain folder. The task's folder goes when it is empty.

        Raises:
            AdapterRefused: The version's task is a link.
        """

    def forget(self, task: str, version: str) -> None:
        """Remove a version from this machine's disk cache."""

    def on_disk(self) -> set[tuple[str, str]]:
        """Return (task, version) of all that this machine's disk cache holds."""


def digest(contents: Mapping[str, bytes]) -> str:
    """Return the version that a folder is.

    It is the first 8 hex digits of a SHA-256 over name, length and bytes of the adapter's config,
    weights and tokenizer files.
    """
    hashed = hashlib.sha256()
    for name in sorted(VERSIONED & contents.keys()):
        hashed.update(f"{name}\0{len(contents[name])}\0".encode())
        hashed.update(contents[name])
    return hashed.hexdigest()[:8]


def limit_bytes(name: str) -> int:
    """Return the most bytes that a file of this name may have."""
    if name == WEIGHTS:
        return MAX_WEIGHTS_BYTES
    if name == GOLDEN:
        return MAX_GOLDEN_BYTES
    return MAX_TOKENIZER_BYTES if name in TOKENIZER else MAX_JSON_BYTES


def local_folder(url: str) -> Path | None:
    """Return the folder that a store's URL or path names, None if it is not on this machine."""
    if "://" not in url:
        return Path(url)
    return Path(url.removeprefix("file://")) if url.startswith("file:///") else None


def check_url(url: str) -> None:
    """Raise ValueError with a sentence if no store can be opened by a URL."""
    scheme, _, rest = url.partition("://")
    if local_folder(url) is not None:
        return
    if scheme == "hf":
        raise ValueError("is a source of versions, not a store; use a folder, s3:// or gs://")
    if scheme not in ("s3", "gs", "memory"):
        raise ValueError("is no store; use a folder, file:///, s3://, gs:// or memory://")
    if not rest.strip("/"):
        raise ValueError(f"names nothing; write {scheme}://bucket/folder")


def open_store(
    url: str, *, cache: Path | None = None, max_cache_bytes: int = MAX_CACHE_BYTES
) -> Store:
    """Open a store by its URL, or by the path of a directory.

    Args:
        url: A path, file:///, s3://, gs:// or memory://. A folder may be empty, and need not exist.
        cache: The folder of the disk cache, for stores that are not on this machine; None for one
            below the system's temporary folder.
        max_cache_bytes: Most bytes in it.

    Raises:
        ValueError: No store can be opened by this URL; the sentence says why.
    """
    # These import what is above.
    from adapters.bucket import Bucket
    from adapters.directory import Directory
    from adapters.disk import Disk, default_folder

    folder = local_folder(url)
    if folder is not None:
        return Directory(folder)
    try:
        check_url(url)
    except ValueError as error:
        raise ValueError(f"{url!r} {error}") from None
    return Bucket(url, Disk(cache or default_folder(), url, max_cache_bytes))
