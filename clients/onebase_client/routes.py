"""The server's routes, whatever characters names have."""

from urllib.parse import quote, urlencode


def route(task: str) -> str:
    """Returns the route of a task, whatever characters its name has."""
    if not task:
        raise ValueError("A task's name cannot be empty.")
    return f"/v1/tasks/{part(task)}"


def part(name: str) -> str:
    """Returns a name as one part of a path; of dots alone it would be none, and cannot be sent."""
    if not name.strip("."):
        raise ValueError(f"{name!r} names nothing.")
    return quote(name, safe="@")


def query(**given: str | int | None) -> str:
    """Returns the query of what is not None."""
    said = {
        name: str(value).lower() if isinstance(value, bool) else value
        for name, value in given.items()
        if value is not None
    }
    return f"?{urlencode(said, quote_via=quote)}" if said else ""
