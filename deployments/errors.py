"""What a caller can be told: one table from errors to HTTP and to builtin exceptions.

    RequestError
    ├── Unauthorized 401  a change without the token
    ├── Forbidden    403  a change or a source that the configuration does not allow
    ├── NoMatch      404  a pattern that no task's name fits
    ├── Conflict     409  a change that does not fit what is there
    ├── Stale        412  a change to a task that another one has changed since
    ├── TooLarge     413  its body is over the limit
    ├── BadInput     422  the request says something that cannot be answered
    ├── Overloaded   429  there are too many rows on their way
    ├── TooLate      504  its deadline passed before it was answered
    └── NotReady     503  no replica can answer at the moment
        ├── ReplicasLost 503  every replica that was asked was lost meanwhile
        └── Unsure   503  a change may have been made, or not
    BatchLoopDied   503  the replica that was asked can answer nothing any more
    AdapterError         (adapters/errors.py) 404 unknown, 413 too large, 503 for that task alone

Unknown exceptions are logged and never echoed.
"""

from __future__ import annotations

from typing import NamedTuple

from adapters.errors import (
    AdapterChanged,
    AdapterIncomplete,
    AdapterRefused,
    BankFull,
    StagingTooLarge,
    StoreUnreachable,
    TaskNotFound,
    VersionNotFound,
)


class RequestError(Exception):
    """A request that gets no answer; the message is one sentence that says what to change."""

    def __init__(self, detail: str) -> None:
        """Take the sentence."""
        super().__init__(detail)
        self.detail = detail


class Unauthorized(RequestError):
    """The request changes something and brings no token, or a wrong one."""


class Forbidden(RequestError):
    """The configuration does not allow this."""


class NoMatch(RequestError):
    """No task's name fits the pattern."""


class Conflict(RequestError):
    """The change does not fit what is there: a version that has traffic cannot be deleted."""


class Stale(RequestError):
    """The task was changed since the caller read the etag that it sent."""


class BadInput(RequestError):
    """The request says something that cannot be answered."""


class TooLarge(RequestError):
    """The request's body is over the limit."""


class Overloaded(RequestError):
    """There are too many rows on their way, of this task or of all.

    Attributes:
        retry_after_s: In how many seconds there may be room.
    """

    def __init__(self, detail: str, retry_after_s: int = 1) -> None:
        """Take the sentence, and when to come again."""
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class NotReady(RequestError):
    """No replica can answer at the moment."""


class TooLate(RequestError):
    """The deadline passed before the answer was there."""


class ReplicasLost(NotReady):
    """Every replica that was asked was lost while it worked on this; it may be why."""


class Unsure(NotReady):
    """A change may have been made, or may still come; nobody knows."""


class BatchLoopDied(RuntimeError):
    """The batch loop ended; no row can be answered by this replica any more."""


class Problem(NamedTuple):
    """An error as HTTP says it (RFC 9457).

    Attributes:
        status: HTTP status.
        title: The kind of problem, the same for every occurrence.
        detail: This occurrence, in one sentence.
        retry_after_s: When another try is worth it, None if never.
    """

    status: int
    title: str
    detail: str
    retry_after_s: int | None = None

    def body(self) -> dict[str, object]:
        """The problem+json document."""
        return {
            "type": "about:blank",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }

    def exception(self) -> Exception:
        """The builtin exception that a handle caller gets, who may have none of our code."""
        return _BUILTINS.get(self.status, RuntimeError)(self.detail)


_BUILTINS: dict[int, type[Exception]] = {
    401: PermissionError,
    403: PermissionError,
    404: LookupError,
    409: ValueError,
    412: ValueError,
    413: ValueError,
    422: ValueError,
    504: TimeoutError,
}

_TABLE: dict[type[Exception], tuple[int, str, int | None]] = {
    Unauthorized: (401, "Unauthorized", None),
    Forbidden: (403, "Forbidden", None),
    NoMatch: (404, "No match", None),
    Conflict: (409, "Conflict", None),
    Stale: (412, "Precondition failed", None),
    BadInput: (422, "Invalid request", None),
    TooLarge: (413, "Request too large", None),
    Overloaded: (429, "Too many requests", 1),
    Unsure: (503, "Outcome unknown", 1),
    ReplicasLost: (503, "Replicas lost", 1),
    NotReady: (503, "Not ready", 1),
    TooLate: (504, "Deadline passed", None),
    BatchLoopDied: (503, "Not ready", 1),
    TaskNotFound: (404, "Unknown task", None),
    VersionNotFound: (404, "Unknown version", None),
    AdapterIncomplete: (503, "Adapter incomplete", 1),
    AdapterChanged: (503, "Adapter changed", 1),
    AdapterRefused: (503, "Adapter refused", None),
    StagingTooLarge: (413, "File too large", None),
    StoreUnreachable: (503, "Store unreachable", 1),
    BankFull: (503, "No room", None),
}


def to_problem(error: Exception) -> Problem | None:
    """Return what a caller is told of an error, None for one that is ours to log."""
    for kind, (status, title, retry_after_s) in _TABLE.items():
        if isinstance(error, kind):
            own = _own(error, kind)
            return Problem(status, title, str(own), getattr(own, "retry_after_s", retry_after_s))
    return None


def _own(error: Exception, kind: type[Exception]) -> Exception:
    """Unwrap what came through a handle: Ray raises a subclass that prints a whole traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, kind) else error


INTERNAL = Problem(500, "Internal error", "something went wrong here; the server's log says what")
