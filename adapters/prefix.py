"""One adapter folder in an object store, where a folder is a prefix: looked at, and read."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from adapters.contents import check_sizes, check_weights, named
from adapters.errors import VERSION_NAME, AdapterIncomplete, StoreUnreachable, TaskNotFound
from adapters.objects import Object, Objects
from adapters.store import CONFIG, PICKLE, READ, WEIGHTS, Files, Look


@dataclass(frozen=True, slots=True)
class Prefix:
    """A folder as a listing showed it.

    Attributes:
        path: What the names of its objects begin with.
        objects: Name after the prefix -> object, of all that a folder may hold.
    """

    path: str
    objects: Mapping[str, Object]

    @classmethod
    def of(cls, path: str, below: Mapping[str, Object], folder: str = "") -> Prefix:
        """Take a folder out of the listing of a path, by its name below that."""
        names = [name for name in (*READ, PICKLE) if f"{folder}{name}" in below]
        return cls(f"{path}{folder}", {name: below[f"{folder}{name}"] for name in names})

    @property
    def look(self) -> Look:
        """What the listing said of the files that are read."""
        looked = {name: one for name, one in self.objects.items() if name in (*READ, PICKLE)}
        entries = [(name, one.num_bytes, one.mark) for name, one in looked.items()]
        changed_s = max((one.changed_s for one in looked.values()), default=0.0)
        return Look(tuple(sorted(entries)), changed_s)

    def read(self, task: str, store: Objects, version: str | None = None) -> Files:
        """Read the folder whole.

        Raises:
            TaskNotFound: It has no adapter_config.json.
            AdapterIncomplete: Its weights are not there yet, or not all; or the store does not
                give them.
            AdapterRefused: It has only a pickle, or a file of absurd size; or it is not `version`.
        """
        if CONFIG not in self.objects:
            raise TaskNotFound(task)
        sizes = {name: one.num_bytes for name, one in self.objects.items()}
        check_sizes(task, sizes)
        with blaming(task):
            contents = {
                name: store.fetch(f"{self.path}{name}", sizes[name])
                for name in READ
                if name in sizes
            }
        check_weights(task, io.BytesIO(contents[WEIGHTS]), sizes[WEIGHTS])
        return named(task, contents, version)


@contextmanager
def blaming(task: str) -> Iterator[None]:
    """Say of a task that it is not complete, when the store does not give it."""
    try:
        yield
    except StoreUnreachable as error:
        raise AdapterIncomplete(task, str(error)) from error
    except FileNotFoundError:
        raise AdapterIncomplete(task, "its folder changed while it was read") from None


def version_names(below: Iterable[str]) -> list[str]:
    """Return the version folders that the names below a task's folder show."""
    parts = [name.split("/") for name in below]
    return [p[0] for p in parts if len(p) == 2 and p[1] == CONFIG and VERSION_NAME.fullmatch(p[0])]
