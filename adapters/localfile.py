"""Local files, opened without waiting for a pipe and without leaving a folder. No torch."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from stat import S_ISDIR, S_ISREG, S_ISSOCK
from typing import BinaryIO


def place_problem(path: str, mode: int, root: str, inside: bool) -> list[str]:
    """Say if a path that exists is no file (a pipe would never end), or leads out of the root.

    Args:
        path: The path.
        mode: What `stat` says of it.
        root: The root, with its own links resolved.
        inside: Whether the path's folder is in it.
    """
    name = os.path.basename(path)
    if not S_ISREG(mode):
        return [f"{name} is a {_kind(mode)}, not a file"]
    if is_inside(os.path.realpath(path), root) if os.path.islink(path) else inside:
        return []
    return [f"{name} is a link to outside of the store; copy it into the store"]


def is_inside(path: str, root: str) -> bool:
    """Tell whether a path, links resolved, lies below a folder."""
    return path.startswith(root.rstrip(os.sep) + os.sep)


def open_file(path: str | Path, *, links: bool = True) -> BinaryIO:
    """Open a file for reading, without waiting for anybody if it has just become a pipe.

    Args:
        path: The file.
        links: Whether it may be a link.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW)
    file = open(os.open(path, flags), "rb")  # noqa: SIM115
    if not S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return file


def read_bounded(path: str | Path, max_bytes: int) -> bytes:
    """Read a file whole, or of one that is over its limit just enough to see that."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        return file.read(min(size, max_bytes) + 1)


def write_new(path: str | Path) -> BinaryIO:
    """Make a file that must not be there yet, not even as a link."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb")


def sync(path: str | Path) -> None:
    """Return when a file or folder is on the disk; a folder without what is in its files."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # SMB: the server does as it likes
            raise
    finally:
        os.close(number)


def _kind(mode: int) -> str:
    return "folder" if S_ISDIR(mode) else "socket" if S_ISSOCK(mode) else "pipe or device"
