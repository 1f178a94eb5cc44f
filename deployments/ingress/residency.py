"""Where versions are resident, over all replicas."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

AskReplicas = Callable[[str, int], Awaitable[Sequence[dict[str, Any]]]]


def merge(pages: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """Join a page of every replica into one by version.

    Args:
        pages: What replicas answer to the same `after` and `limit`: `replica`, `slots_free`,
            `pages_free`, `versions` in the order of `task@version`, or of `task` where it is not
            known which could not be loaded, and `next` where there is more.
        limit: Most versions in the answer.

    Returns:
        `replicas` with their free slots and pages; `versions`, each with its `replicas`, by name,
        and where each has it; and `next` where there is more.
    """
    versions: dict[str, dict[str, Any]] = {}
    for page in pages:
        for entry in page["versions"]:
            told = dict(entry)
            task, version = told.pop("task"), told.pop("version")
            name = task if version is None else f"{task}@{version}"
            merged = versions.setdefault(name, {"task": task, "version": version, "replicas": {}})
            merged["replicas"][page["replica"]] = told
    # Past the last one of a replica that has more, it may hold what it has not told of.
    ends = [page["next"] for page in pages if page.get("next")]
    names = sorted(name for name in versions if not ends or name <= min(ends))
    answer: dict[str, Any] = {
        "replicas": [
            {name: page[name] for name in ("replica", "slots_free", "pages_free")}
            for page in sorted(pages, key=lambda page: str(page["replica"]))
        ],
        "versions": [versions[name] for name in names[:limit]],
    }
    if len(names) > limit:
        answer["next"] = names[limit - 1]
    elif ends:
        answer["next"] = min(ends)
    return answer
