"""What tasks exist and which version answers each: the catalog's state, as everybody reads it.

No ray, no torch. A snapshot is never changed; the catalog makes a new one (`catalog/state.py`), and
watchers hold the last that they were told.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

FORMAT = 1
"""Of `catalog/{n}.json`; a file of another one is refused, never rewritten."""

Share = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Version = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class VersionRecord(_Plain):
    """One version of a task: files in `{task}/{version}/`."""

    created_s: float = Field(description="When it came, in seconds since the epoch.")
    by: str = Field(description="Who brought it.")
    source: str = Field(description='Where from: "upload", "folder", or the source\'s URL.')


class Shadow(_Plain):
    """A version that runs beside the one that answers, on a sample, and answers nobody."""

    version: Version
    share: Share = 1.0


class TaskRecord(_Plain):
    """A task that was changed through the catalog.

    A task that never was is not in the catalog: its plain folder says all of it.
    """

    revision: int = Field(description="The catalog's when this task last changed; its etag.")
    active: Version = Field(description="Answers what `traffic` gives to no other version.")
    versions: dict[Version, VersionRecord]
    previous: tuple[Version, ...] = Field(
        (), description="Versions that were active before, oldest first; rollback takes the last."
    )
    traffic: dict[Version, Share] = Field(
        {}, description="Shares of versions other than the active one, which gets the rest."
    )
    max_error_rate: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Over it a version in `traffic` loses its share."
    )
    shadow: Shadow | None = None
    fallback: Version | None = Field(
        None, description="Answers while the active version cannot be loaded; None fails closed."
    )
    pinned: bool = Field(False, description="Whether what answers never leaves its slots.")
    rules: dict[str, Any] = Field({}, description="Laid over the versions' own task.json.")
    folder: Version | None = Field(
        None, description="What its plain folder held when it was last taken in."
    )
    deleted: bool = Field(False, description="It is no task any more; its files are going.")
    doomed: tuple[Version, ...] = Field((), description="Deleted versions whose files are going.")
    purger: str | None = Field(
        None, description="Who alone removes files of what was deleted, of all clusters."
    )

    @property
    def answering(self) -> tuple[Version, ...]:
        """Versions that have traffic, the active one first."""
        return (self.active, *(version for version in self.traffic if version != self.active))

    @property
    def in_use(self) -> frozenset[Version]:
        """Versions that may be asked for."""
        others = (self.fallback, self.shadow and self.shadow.version)
        return frozenset((*self.answering, *(version for version in others if version)))


class Snapshot(_Plain):
    """All tasks of the catalog at one revision."""

    revision: int = 0
    tasks: dict[Name, TaskRecord] = {}


class TaskPatch(_Plain):
    """`PATCH /v1/tasks/{task}`: what is not given stays as it is."""

    active: Version | None = Field(None, description="A version; it is in slots before it answers.")
    traffic: dict[Version, Annotated[float, Field(ge=0, le=1)]] | None = Field(
        None,
        description="Shares of versions, at most 1 together; the active one gets the rest. "
        "It replaces all shares: {} gives everything to the active version.",
    )
    max_error_rate: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="A version in traffic that fails more often loses its share."
    )
    shadow: Shadow | None = Field(None, description="null ends it.")
    fallback: Version | None = Field(None, description="null fails closed.")
    pinned: bool = False
    rules: dict[str, Any] = Field(
        {}, description="Keys of task.json; null takes one back to the version's own."
    )
