"""Versions on their way in: files into staging, and staging to the catalog."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect, Request

from adapters.errors import TASK_NAME, AdapterIncomplete, AdapterRefused, TaskNotFound
from adapters.store import READ, Store
from deployments.errors import BadInput, NotReady, Unsure, to_problem
from deployments.ingress.catalog import Catalog
from deployments.ingress.sources import Sources

logger = logging.getLogger("ray.serve")

_PART = "files"
# Slow sources must not hold the threads that tokenise for everybody else.
_STAGED_AT_ONCE = 4


class Uploads:
    """Makes versions of uploaded files and of sources."""

    def __init__(self, store: Store, catalog: Catalog, sources: Sources) -> None:
        """Take where files are staged, who publishes them, and what fetches sources."""
        self._store = store
        self._catalog = catalog
        self._sources = sources
        self._threads = ThreadPoolExecutor(_STAGED_AT_ONCE, thread_name_prefix="staging")
        self._going = set[asyncio.Task[dict[str, Any]]]()

    async def upload(
        self, task: str, request: Request, *, by: str, activate: bool, if_match: int | None
    ) -> dict[str, Any]:
        """Publish a request's files as a version; return the catalog's answer.

        Starlette spools files over 1 MiB to unnamed files in the temporary folder, so that they
        are gone with the form, or with the process.

        Raises:
            TaskNotFound: The name cannot be a task's.
            BadInput: The form is wrong, or the adapter was refused.
            RequestError, AdapterError: As the store and the catalog raise them.
        """
        _check_name(task)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            raise BadInput(f"send multipart/form-data, with a part named {_PART!r} for each file")
        try:
            # One over, so that what is too much is named by us.
            async with request.form(max_files=len(READ) + 1, max_fields=1) as form:
                files = to_files(form)

                def stage() -> tuple[str, str]:
                    return self._store.stage(files), "upload"

                return await self._publish(task, stage, by=by, activate=activate, if_match=if_match)
        except ClientDisconnect:
            raise BadInput("the connection ended before all of the upload had come") from None

    async def add(
        self, task: str, source: str, *, by: str, activate: bool, if_match: int | None
    ) -> dict[str, Any]:
        """Publish what a source holds as a version; return the catalog's answer.

        Raises:
            TaskNotFound: The name cannot be a task's.
            BadInput: The source is wrong, or the adapter was refused.
            RequestError, AdapterError: As the sources, the store and the catalog raise them.
        """
        _check_name(task)

        def stage() -> tuple[str, str]:
            return self._sources.stage(source)

        return await self._publish(task, stage, by=by, activate=activate, if_match=if_match)

    async def _publish(
        self, task: str, stage: Callable[[], tuple[str, str]], **change: Any
    ) -> dict[str, Any]:
        """Run to the end even when the caller goes: only then is nothing left behind."""
        work = asyncio.create_task(self._run(task, stage, **change))
        self._going.add(work)
        work.add_done_callback(self._ended)
        return await asyncio.shield(work)

    def _ended(self, work: asyncio.Task[dict[str, Any]]) -> None:
        self._going.discard(work)
        if not work.cancelled():
            work.exception()  # whoever waited was told; if nobody did, asyncio need not complain

    async def _run(
        self, task: str, stage: Callable[[], tuple[str, str]], **change: Any
    ) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        staging, source = await loop.run_in_executor(self._threads, stage)
        try:
            return await self._catalog.publish(task, staging, source=source, **change)
        except (AdapterRefused, AdapterIncomplete) as error:
            # Of a folder in the store it may be mended by waiting; an upload stays what it is.
            problem = to_problem(error)
            raise BadInput(problem.detail if problem else str(error)) from None
        except Unsure:
            raise  # the staging stays, for whoever clears up
        except NotReady:
            # The catalog may not have been reached, who discards what it was given.
            await loop.run_in_executor(self._threads, self._store.discard, staging)
            raise


def to_files(form: FormData) -> dict[str, BinaryIO]:
    """Return an upload's files by their names.

    Raises:
        BadInput: It has other parts than `files`, other names than an adapter's, one twice, or
            none; the message says all that is wrong.
    """
    problems, files, odd = [], dict[str, BinaryIO](), []
    for part, value in form.multi_items():
        if part != _PART or not isinstance(value, UploadFile):
            problems.append(f"the part {part!r} is not a file named {_PART!r}")
        elif (name := value.filename or "") not in READ:
            odd.append(name)
        elif name in files:
            problems.append(f"{name} comes twice")
        else:
            files[name] = value.file
    if odd:
        told = ", ".join(repr(name[:100]) for name in odd)
        problems.append(f"it has {told}, and takes only {', '.join(READ)}, without a folder")
    if not files and not problems:
        problems.append(f"it has no file; send a part named {_PART!r} for each")
    if problems:
        raise BadInput(f"the upload is refused: {'; '.join(problems)}")
    return files


def _check_name(task: str) -> None:
    if not TASK_NAME.fullmatch(task):
        raise TaskNotFound(task)
