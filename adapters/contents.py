"""What a folder must hold to be read, told before it is read and from its first bytes. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO

from adapters.errors import AdapterIncomplete, AdapterRefused, StoreUnreachable, TaskNotFound
from adapters.store import (
    CONFIG,
    MAX_JSON_BYTES,
    MAX_WEIGHTS_BYTES,
    PICKLE,
    WEIGHTS,
    Files,
    digest,
    limit_bytes,
)


def check_sizes(task: str, sizes: Mapping[str, int]) -> None:
    """Check that the weights are there, as safetensors, and that no file is over its limit.

    Args:
        task: Whose folder it is.
        sizes: Name -> bytes of the files in it.

    Raises:
        AdapterIncomplete: The weights are not there yet.
        AdapterRefused: There is only a pickle, or a file is over its limit.
    """
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
        if name != PICKLE and size > (limit := limit_bytes(name))
    ]
    if problems:
        raise AdapterRefused(task, problems)


def check_weights(task: str, file: BinaryIO, num_bytes: int) -> None:
    """Compare a safetensors file's length with the one that its header declares.

    Args:
        task: Whose it is.
        file: The file, at its beginning.
        num_bytes: How long it is.

    Raises:
        AdapterIncomplete: It is shorter.
        AdapterRefused: The header, or what it declares, is of absurd size.
    """
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or num_bytes < 8 + length <= MAX_JSON_BYTES:
        raise AdapterIncomplete(task, f"{WEIGHTS} has only {num_bytes} bytes")
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
    if num_bytes < declared:
        raise AdapterIncomplete(task, f"{WEIGHTS} has {num_bytes} of {declared} bytes")


def named(task: str, contents: Mapping[str, bytes], version: str | None = None) -> Files:
    """Name a folder's contents by their digest.

    Raises:
        AdapterRefused: It is not `version`, the name of the folder that they were read from.
    """
    found = digest(contents)
    if version is not None and found != version:
        raise AdapterRefused(
            task,
            [
                f"its folder {version} holds version {found}: its files were changed after they "
                "were published; delete this version and publish it again"
            ],
        )
    return Files(task, found, contents)


@contextmanager
def nothing_more_comes(task: str) -> Iterator[None]:
    """Refuse what is not complete, where waiting for the rest is no use."""
    try:
        yield
    except TaskNotFound:
        raise AdapterRefused(task, [f"{CONFIG} is missing"]) from None
    except AdapterIncomplete as error:
        if isinstance(error.__cause__, StoreUnreachable):
            raise error.__cause__ from None
        raise AdapterRefused(task, [error.reason]) from None
