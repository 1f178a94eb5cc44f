"""What names a place that versions come from, and which names are allowed. No IO."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from adapters.geometry import HUB_ID

SCHEMES = ("hf", "s3", "gs", "file")
# Whatever means something else to one of those who read a URL is left out: % escapes, ? # and \,
# the : of a port, a password or a chain of fsspec's, and the * [ ] of its patterns.
_PART = re.compile(r"[\w.+=,@~-]+(?: +[\w.+=,@~-]+)*")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]*")
_REVISION = re.compile(r"[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Source:
    """A folder of adapter files: `hf://org/name@revision/folder`, `s3://…`, `gs://…`, `file://…`.

    Attributes:
        scheme: One of `SCHEMES`.
        path: What follows `://`, without a slash at its end; absolute for `file`.
    """

    scheme: str
    path: str

    @classmethod
    def parse(cls, name: str) -> Source:
        """Read a source's name.

        Raises:
            ValueError: It is none; the message is one sentence.
        """
        source = cls.parse_prefix(name)
        first, *rest = source.path.split("/")
        if source.scheme == "hf" and (not rest or not _is_repository(f"{first}/{rest[0]}")):
            raise ValueError(f"{name!r} is not hf://org/name@revision, or a folder of one")
        if not any((first, *rest)):
            raise ValueError(f"{name!r} names no folder")
        return source

    @classmethod
    def parse_prefix(cls, name: str) -> Source:
        """Read the beginning of sources' names, `hf://` the shortest of all.

        Raises:
            ValueError: It is none; the message is one sentence.
        """
        scheme, divider, path = name.partition("://")
        scheme, path = scheme.lower(), path.removesuffix("/")
        if not divider or scheme not in SCHEMES:
            raise ValueError(f"{name!r} is not a source: hf://…, s3://…, gs://… or file://…")
        parts = path.split("/") if path else []
        if scheme == "file" and parts and parts.pop(0):
            raise ValueError(f"{name!r} is not file:///…, a folder by its whole path")
        for part in parts:
            if not _PART.fullmatch(part) or part in (".", ".."):
                raise ValueError(
                    f"{name!r} is not taken for its part {part!r}: a part has letters, digits, "
                    "spaces and ._+=,@~- and is neither empty nor . nor .."
                )
        if scheme in ("s3", "gs") and parts and not _BUCKET.fullmatch(parts[0]):
            raise ValueError(f"{name!r} is not {scheme}://bucket/folder")
        if scheme == "hf" and any("@" in part for part in (*parts[:1], *parts[2:])):
            raise ValueError(f"{name!r} has an @ that is not of its revision")
        return cls(scheme, path)

    def begins_with(self, prefix: Source) -> bool:
        """Tell whether another source's name is this one's, or one of a folder that it lies in."""
        if self.scheme != prefix.scheme or not self.path.startswith(prefix.path):
            return False
        # hf://org/name is all of its revisions. A bucket that goes on with @ is another bucket.
        ends = ("", "/", "@") if self.scheme == "hf" else ("", "/")
        return not prefix.path or self.path[len(prefix.path) :][:1] in ends

    @property
    def repository(self) -> str:
        """Of `hf`: org/name."""
        return "/".join(self.path.split("/")[:2]).partition("@")[0]

    @property
    def revision(self) -> str | None:
        """Of `hf`: what follows the @, None if there is none."""
        return self.path.split("/")[1].partition("@")[2] or None

    @property
    def folder(self) -> str:
        """Of `hf`: the folder in the repository, empty for its root."""
        return "/".join(self.path.split("/")[2:])

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"


def is_allowed(source: Source, prefixes: Iterable[Source]) -> bool:
    """Tell whether any of the prefixes names the source."""
    return any(source.begins_with(prefix) for prefix in prefixes)


def _is_repository(name: str) -> bool:
    stem, divider, revision = name.partition("@")
    return bool(HUB_ID.fullmatch(stem) and bool(_REVISION.fullmatch(revision)) == bool(divider))
