"""What a server answers when it refuses."""

from typing import Any

import httpx2


class OnebaseError(Exception):
    """The server's refusal of a request.

    Attributes:
        status: The HTTP status.
        title: What kind of problem it is, the same for each of its kind.
        detail: What is wrong with this request; empty if the server did not say.
    """

    def __init__(self, status: int, title: str, detail: str) -> None:
        super().__init__(status, title, detail)  # All of them, so that the error pickles.
        self.status = status
        self.title = title
        self.detail = detail

    def __str__(self) -> str:
        said = f"{self.status} {self.title}"
        return f"{said}: {self.detail}" if self.detail else said


def json_object(response: httpx2.Response) -> dict[str, Any] | None:
    """Returns the JSON object in the body; None if the body is anything else."""
    try:
        answer = response.json()
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def refusal(response: httpx2.Response, problem: dict[str, Any]) -> OnebaseError:
    """Returns the error that problem details (RFC 9457) tell of.

    What stands between the client and the server answers in its own words, so both members may be
    missing: the title then falls back on the status's phrase, as the RFC says of `about:blank`.
    """
    title = problem.get("title") or response.reason_phrase or "Unknown status"
    return OnebaseError(response.status_code, str(title), str(problem.get("detail") or ""))
