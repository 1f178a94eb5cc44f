"""The calls that a onebase server answers, over HTTP.

Errors:

    OnebaseError             the server answered, but not with what was asked for
    httpx2.TransportError    no answer came: no connection, a timeout, a broken one
"""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

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


class Client:
    """Asks one onebase server, over connections that stay open until it is closed.

    Threads may share it. Nothing is retried.

    Args:
        base_url: Where the server is. Its path, if any, goes before every route.
        timeout_s: How long to wait for a connection, and then for each read and write.
        transport: What carries the requests in place of a network, such as
            `httpx2.MockTransport`.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        timeout_s: float = 30.0,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._http = httpx2.Client(base_url=base_url, timeout=timeout_s, transport=transport)

    def predict(
        self,
        task: str,
        texts: str | Mapping[str, str] | Sequence[str | Mapping[str, str]],
        *,
        return_scores: bool = False,
        threshold: float | None = None,
    ) -> dict[str, Any]:
        """Classifies the texts, and returns the answer with a prediction for each, in their order.

        Args:
            task: The task's name, as `tasks` lists it.
            texts: The texts, or for a task of pairs `{"text": …, "text_pair": …}` each. A single
                string or pair is one input.
            return_scores: Whether each prediction carries the scores of all labels.
            threshold: The score from which a label counts, in place of the task's own.

        Raises:
            OnebaseError: The server refused, or answered with something else than JSON.
            httpx2.TransportError: No answer came.
        """
        body: dict[str, Any] = {
            "texts": [texts] if isinstance(texts, (str, Mapping)) else list(texts),
            "return_scores": return_scores,
        }
        if threshold is not None:
            body["threshold"] = threshold
        return self._ask("POST", f"{_route(task)}/predict", body)

    def tasks(self) -> list[dict[str, Any]]:
        """Returns what the server says of each of its tasks, however many pages they fill.

        Raises:
            OnebaseError: The server refused, or answered with something else than JSON.
            httpx2.TransportError: No answer came.
        """
        answer = self._ask("GET", "/v1/tasks")
        tasks: list[dict[str, Any]] = answer["tasks"]
        while "next" in answer:
            answer = self._ask("GET", f"/v1/tasks?after={quote(answer['next'], safe='')}")
            tasks += answer["tasks"]
        return tasks

    def task(self, name: str) -> dict[str, Any]:
        """Returns what the server says of one task.

        Raises:
            OnebaseError: There is no such task (status 404), the server refused, or answered with
                something else than JSON.
            httpx2.TransportError: No answer came.
        """
        return self._ask("GET", _route(name))

    def close(self) -> None:
        """Closes the connections. The client cannot be used any more."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, method: str, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Returns the JSON object that the server answers with, or raises its refusal."""
        response = self._http.request(method, route, json=body)
        answer = _json_object(response)
        if not response.is_success:
            raise _refusal(response, answer or {})
        if answer is None:
            raise OnebaseError(
                response.status_code, "Not a onebase answer", f"{response.url} sent no JSON object."
            )
        return answer


def _route(task: str) -> str:
    """Returns the route of a task, whatever characters its name has."""
    if not task:
        raise ValueError("A task's name cannot be empty.")
    return f"/v1/tasks/{quote(task, safe='@')}"


def _json_object(response: httpx2.Response) -> dict[str, Any] | None:
    """Returns the JSON object in the body; None if the body is anything else."""
    try:
        answer = response.json()
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _refusal(response: httpx2.Response, problem: dict[str, Any]) -> OnebaseError:
    """Returns the error that problem details (RFC 9457) tell of.

    What stands between the client and the server answers in its own words, so both members may be
    missing: the title then falls back on the status's phrase, as the RFC says of `about:blank`.
    """
    title = problem.get("title") or response.reason_phrase or "Unknown status"
    return OnebaseError(response.status_code, str(title), str(problem.get("detail") or ""))
