"""The names of an object store, a page at a time, past folders that are of no interest. No torch.

`find` of fsspec lists all there is. The history of a catalog is never pruned, and would soon be
most of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_PAGE = 1000  # the most that any store gives

Page = tuple[dict[str, str], bool]
"""Name -> what changes with its content, and whether there are more pages."""
NextPage = Callable[[str], Page]
"""Lists what comes after a name, or from it on, by code points."""


def pages_of(files: Any, root: str) -> NextPage:
    """Return what lists below a path of a file system, as `filesystem.open_filesystem` opens it."""
    bucket, _, folder = root.partition("/")
    prefix = f"{folder}/" if folder else ""

    def s3(after: str) -> Page:
        given = {"Prefix": prefix, "StartAfter": f"{prefix}{after}", "MaxKeys": _PAGE}
        page = files.call_s3("list_objects_v2", Bucket=bucket, **given)
        listed = page.get("Contents", [])
        found = {one["Key"]: f"{one['ETag']} {one['LastModified']}" for one in listed}
        return _below(found, prefix), page["IsTruncated"]

    def gs(after: str) -> Page:
        given = {"prefix": prefix, "startOffset": f"{prefix}{after}", "maxResults": _PAGE}
        page = files.call("GET", "b/{}/o", bucket, json_out=True, **given)
        found = {one["name"]: f"{one['etag']} {one['updated']}" for one in page.get("items", [])}
        return _below(found, prefix), "nextPageToken" in page

    def memory(after: str) -> Page:
        found = files.find(root, detail=True)
        return _below({name: str(one["created"]) for name, one in found.items()}, f"{root}/"), False

    return {"s3": s3, "gs": gs}.get(_scheme(files), memory)


def names_but(next_page: NextPage, without: Sequence[str]) -> dict[str, str]:
    """List all names but those in some folders, each with what changes with its content.

    Of a folder that is left out a page is read at most, where it begins; the next one is asked for
    from behind it.

    Args:
        next_page: Lists.
        without: Beginnings of names, each to its slash.
    """
    names: dict[str, str] = {}
    after, more = "", True
    while more:
        found, more = next_page(after)
        names.update(
            {name: mark for name, mark in found.items() if not name.startswith(tuple(without))}
        )
        last = max(found, default=after)
        behind = [f"{folder[:-1]}0" for folder in without if last.startswith(folder)]
        after = behind[0] if behind else last  # "0" is what follows a slash
    return names


def _below(found: dict[str, str], prefix: str) -> dict[str, str]:
    return {name[len(prefix) :]: mark for name, mark in found.items() if name.startswith(prefix)}


def _scheme(files: Any) -> str:
    protocol = files.protocol
    return str(protocol if isinstance(protocol, str) else protocol[0])
