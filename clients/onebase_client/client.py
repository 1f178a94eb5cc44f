"""The calls that a onebase server answers, over HTTP.

Errors:

    OnebaseError             the server answered, but not with what was asked for
    httpx2.TransportError    no answer came: no connection, a timeout, a broken one
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from types import TracebackType
from typing import Any, BinaryIO, Self

import httpx2

from onebase_client.files import open_files
from onebase_client.refusal import OnebaseError, json_object, refusal
from onebase_client.routes import part, query, route

_PAGE = 1000

Texts = str | Mapping[str, str] | Sequence[str | Mapping[str, str]]


class Client:
    """Asks one onebase server, over connections that stay open until it is closed.

    Threads may share it. Nothing is retried.

    Args:
        base_url: Where the server is. Its path, if any, goes before every route.
        timeout_s: How long to wait for a connection, and then for each read and write.
        transport: What carries the requests in place of a network, such as
            `httpx2.MockTransport`.
        token: The server's `ONEBASE_ADMIN_TOKEN`, for calls that change something.
        change_timeout_s: As `timeout_s`, for these calls: the server fetches, checks and loads a
            version before it answers.

    Raises:
        ValueError: The token has other characters than ASCII, which no header can carry.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        timeout_s: float = 30.0,
        transport: httpx2.BaseTransport | None = None,
        token: str | None = None,
        change_timeout_s: float = 300.0,
    ) -> None:
        if token is not None and not token.isascii():
            raise ValueError("The token has characters that are not ASCII; none such can be sent.")
        self._change_timeout_s = change_timeout_s
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self._http = httpx2.Client(
            base_url=base_url, timeout=timeout_s, transport=transport, headers=headers
        )

    def predict(
        self,
        task: str,
        texts: Texts,
        *,
        return_scores: bool = False,
        threshold: float | None = None,
        routing_key: str | None = None,
    ) -> dict[str, Any]:
        """Classifies the texts, and returns the answer with a prediction for each, in their order.

        Args:
            task: The task's name, as `tasks` lists it.
            texts: The texts, or for a task of pairs `{"text": …, "text_pair": …}` each. A single
                string or pair is one input.
            return_scores: Whether each prediction carries the scores of all labels.
            threshold: The score from which a label counts, in place of the task's own.
            routing_key: While traffic is split, calls with the same key get the same version.

        Raises:
            OnebaseError: The server refused, or answered with something else than JSON.
            httpx2.TransportError: No answer came.
        """
        body, headers = _asked(texts, return_scores, threshold, routing_key)
        return self._ask("POST", f"{route(task)}/predict", json=body, headers=headers)

    def predict_many(
        self,
        tasks: str | Mapping[str, str] | Sequence[str],
        texts: Texts,
        *,
        return_scores: bool = False,
        threshold: float | None = None,
        routing_key: str | None = None,
    ) -> dict[str, Any]:
        """Classifies the texts by many tasks at once; a task that fails fails alone.

        `tasks` are their names, one string being one name, or `{"match": "guard-*"}` for all that
        fit. Of the answer, `answers` has by task what `predict` returns, or an `error` with the
        `status` that it alone would have had, and `failed` names those. The other arguments, and
        the errors, are those of `predict`.
        """
        body, headers = _asked(texts, return_scores, threshold, routing_key)
        if not isinstance(tasks, Mapping):
            tasks = [tasks] if isinstance(tasks, str) else list(tasks)
        return self._ask("POST", "/v1/predict", json={"tasks": tasks, **body}, headers=headers)

    def tasks(self) -> list[dict[str, Any]]:
        """Returns what the server says of each of its tasks, however many pages they fill.

        Raises:
            OnebaseError: The server refused, or answered with something else than JSON.
            httpx2.TransportError: No answer came.
        """
        answer = self._ask("GET", "/v1/tasks")
        tasks: list[dict[str, Any]] = answer["tasks"]
        while "next" in answer:
            answer = self._ask("GET", f"/v1/tasks{query(after=answer['next'])}")
            tasks += answer["tasks"]
        return tasks

    def task(self, name: str) -> dict[str, Any]:
        """Returns what the server says of one task.

        Raises:
            OnebaseError: There is no such task (status 404), the server refused, or answered with
                something else than JSON.
            httpx2.TransportError: No answer came.
        """
        return self._ask("GET", route(name))

    def upload(
        self,
        task: str,
        files: str | PathLike[str] | Mapping[str, bytes | BinaryIO],
        *,
        activate: bool = False,
        if_match: int | None = None,
    ) -> dict[str, Any]:
        """Uploads a version; the first one of a task answers at once.

        This and every other change returns once it is durable: what it has made of the task, with
        its `etag`, and whether it is `everywhere` already. What may be refused, an error says.

        Args:
            task: The task, which need not exist yet.
            files: A PEFT folder, of which an adapter's files are taken, or their content by name.
            activate: Whether it answers at once though there are others.
            if_match: Only if the task's etag is this one.

        Raises:
            OnebaseError: The server refused: 401 or 403 without the right `token`, 412 if the task
                was changed since, 413 if it is too large, 422 with all that is wrong with it.
            httpx2.TransportError: No answer came; a change may have been made or not.
            ValueError: The folder has no adapter.
        """
        with ExitStack() as opened:
            parts = [("files", part) for part in open_files(files, opened)]
            return self._change(
                "PUT", f"{route(task)}/versions{query(activate=activate)}", if_match, files=parts
            )

    def add(
        self, task: str, source: str, *, activate: bool = False, if_match: int | None = None
    ) -> dict[str, Any]:
        """Has the server fetch a version from hf://org/name@revision, s3://…, gs://… or file://….

        Arguments and errors are those of `upload`; 403 is also a source that it may not fetch.
        """
        body = {"source": source, "activate": activate}
        return self._change("POST", f"{route(task)}/versions", if_match, json=body)

    def update(self, task: str, *, if_match: int | None = None, **patch: Any) -> dict[str, Any]:
        """Changes what a task does, of which what is not given stays.

        Args:
            task: The task.
            if_match: Only if the task's etag is this one.
            patch: `active`, `traffic`, `max_error_rate`, `shadow`, `fallback`, `pinned`, `rules`.

        Raises:
            OnebaseError: As `upload`.
            httpx2.TransportError: As `upload`.
        """
        return self._change("PATCH", route(task), if_match, json=patch)

    def rollback(self, task: str, *, if_match: int | None = None) -> dict[str, Any]:
        """Lets the version answer that was active before; errors are those of `upload`."""
        return self._change("POST", f"{route(task)}/rollback", if_match)

    def delete(
        self, task: str, version: str | None = None, *, if_match: int | None = None
    ) -> dict[str, Any]:
        """Deletes a version, or the task with all of them; errors are those of `upload`.

        A version that may still be asked for is refused with status 409.
        """
        path = route(task) if version is None else f"{route(task)}/versions/{part(version)}"
        return self._change("DELETE", path, if_match)

    def history(self, task: str | None = None, *, limit: int = 100) -> list[dict[str, Any]]:
        """Returns the last changes of a task or of all: who, when, what; the newest first.

        Raises:
            OnebaseError: The server refused, or answered with something else than JSON.
            httpx2.TransportError: No answer came.
        """
        changes: list[dict[str, Any]] = []
        before: int | None = None
        while len(changes) < limit:
            page = min(limit - len(changes), _PAGE)
            asked = query(task=task, before=before, limit=page)
            answer = self._ask("GET", f"/v1/history{asked}")
            changes += answer["changes"]
            before = answer.get("next")
            if before is None:
                break
        return changes

    def residency(self) -> dict[str, Any]:
        """Returns the `replicas` of the model and which `versions` each holds, and where.

        Raises:
            OnebaseError: The server refused, or answered with something else than JSON.
            httpx2.TransportError: No answer came.
        """
        answer = self._ask("GET", f"/v1/residency{query(limit=_PAGE)}")
        versions = answer["versions"]
        while "next" in answer:
            answer = self._ask("GET", f"/v1/residency{query(limit=_PAGE, after=answer['next'])}")
            versions += answer["versions"]
        return {"replicas": answer["replicas"], "versions": versions}

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

    def _change(
        self, method: str, path: str, if_match: int | None, **content: Any
    ) -> dict[str, Any]:
        headers = {} if if_match is None else {"if-match": f'"{if_match}"'}
        timeout_s = self._change_timeout_s
        return self._ask(method, path, headers=headers, timeout=timeout_s, **content)

    def _ask(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        """Returns the JSON object that the server answers with, or raises its refusal."""
        response = self._http.request(method, path, **content)
        answer = json_object(response)
        if not response.is_success:
            raise refusal(response, answer or {})
        if answer is None:
            raise OnebaseError(
                response.status_code, "Not a onebase answer", f"{response.url} sent no JSON object."
            )
        return answer


def _asked(
    texts: Texts, return_scores: bool, threshold: float | None, routing_key: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the body and headers that say what is asked for."""
    body: dict[str, Any] = {
        "texts": [texts] if isinstance(texts, (str, Mapping)) else list(texts),
        "return_scores": return_scores,
    }
    if threshold is not None:
        body["threshold"] = threshold
    return body, {} if routing_key is None else {"x-routing-key": routing_key}
