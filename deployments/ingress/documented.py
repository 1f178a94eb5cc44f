"""What /docs says of parameters and answers that several routes have."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Header, Path, Query

PAGE, LARGEST_PAGE = 100, 1000
TaskName = Annotated[str, Path(description="The task's name.")]
VersionName = Annotated[str, Path(description="8 hex digits of the version's content.")]
Limit = Annotated[int, Query(ge=1, le=LARGEST_PAGE, description="Most entries in the answer.")]

FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "files": {"type": "array", "items": {"type": "string", "format": "binary"}}
                    },
                }
            }
        },
    }
}
"""An upload, which is read as it comes and so is no parameter of its route."""

_PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string", "description": "The kind of problem."},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What to change, in a sentence."},
    },
}


def problems(**said: str) -> dict[int | str, dict[str, Any]]:
    """Return answers in problem+json: `_404` is 404, and what it says."""
    content = {"application/problem+json": {"schema": _PROBLEM}}
    return {
        int(status.removeprefix("_")): {"description": description, "content": content}
        for status, description in said.items()
    }


CHANGE_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "It is durable, and every ingress answers by it. `ETag` is the task's."},
    202: {
        "description": "It is durable; an ingress still answers by the state before it.",
        "headers": {
            "Location": {
                "description": "Says when every ingress answers by it.",
                "schema": {"type": "string"},
            }
        },
    },
    **problems(
        _401="The token is missing or wrong.",
        _403="There is no token and the server listens to others than its own machine; or the "
        "source is not allowed.",
        _404="There is no such task or version.",
        _409="It does not fit what is there.",
        _412="The task was changed since the etag in `If-Match`.",
        _413="The body is over the limit.",
        _422="The request is wrong, or the version cannot be served; with all problems.",
        _503="It cannot be done at the moment; or the catalog was lost, and nobody knows whether "
        "it was done.",
    ),
}
NEW_VERSION: dict[int | str, dict[str, Any]] = {
    201: {"description": "There is a new version, and every ingress knows it."}
}


async def if_match(
    etag: Annotated[
        str | None,
        Header(
            alias="If-Match",
            description="The task's `ETag`; the change is refused if the task has another by now.",
            examples=['"5"'],
        ),
    ] = None,
) -> None:
    """Have the header documented; the routes read it themselves, for it may be malformed."""
