"""Where a base comes from. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from adapters.geometry import hub_id


class BaseUnavailable(ValueError):
    """The base cannot be loaded or served; the message is one sentence that says what to change."""


@dataclass(frozen=True, slots=True)
class BaseName:
    """A local folder, or a hub id with its revision.

    Attributes:
        path: A folder, absolute, or `org/name`.
        revision: After the `@` of a hub id, else None.
        hub_id: `org/name`, or None for a folder.
    """

    path: str
    revision: str | None
    hub_id: str | None

    @classmethod
    def parse(cls, name: str) -> BaseName:
        """Read `base_model`: what exists as a folder is one, else it must be a hub id.

        Raises:
            BaseUnavailable: It is neither.
        """
        if Path(name).is_dir():
            return cls(os.fspath(Path(name).absolute()), None, None)
        stem = hub_id(name)
        if stem is None:
            raise BaseUnavailable(
                f"base_model={name!r} is neither a folder nor a hub id (org/name@revision)"
            )
        _, _, revision = name.partition("@")
        return cls(stem, revision or None, stem)

    def __str__(self) -> str:
        """The name as `base_model` gives it."""
        return f"{self.path}@{self.revision}" if self.revision else self.path
