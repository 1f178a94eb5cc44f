"""Requests that fail leave no cycles behind: an ingress seldom looks for such (`garbage.py`)."""

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from adapters.directory import Directory
from adapters.errors import AdapterError, AdapterRefused, BankFull, StoreUnreachable
from deployments.errors import BadInput, Overloaded, RequestError, TooLate
from deployments.garbage import look_when_calm
from deployments.ingress.described import Described
from deployments.ingress.folders import Folders
from deployments.ingress.predict import Predictor
from deployments.ingress.replicas import Replicas
from deployments.ingress.routes import make_api
from deployments.ingress.tasks import Tasks
from deployments.ingress.wire import PredictRequest
from deployments.room import Room
from deployments.rows import Facts, Parcel, Reply
from deployments.snapshot import Snapshot, TaskRecord
from deployments.tokens import Tokenizer

GOOD, REFUSED, REFUSED_TOO, FAILS, FULL, HANGS = (letter * 8 for letter in "abcdef")
TIMES = 20


class Model:
    """One replica, and what it says of versions, as their names tell."""

    def __init__(self, make_facts: Callable[..., Facts]) -> None:
        self._make_facts = make_facts

    async def describe(self, task: str, version: str = "", rules: Any = None) -> Facts:
        if version in (REFUSED, REFUSED_TOO):
            raise AdapterRefused(task, ["no head"])
        return self._make_facts(task=task, version=version)

    async def publish(self, heard: dict[str, int]) -> list[Any]:
        return [("r", None)]

    async def exchange(
        self, replica: str, ingress: str, heard: int, parcels: Sequence[Parcel], gone: Any
    ) -> Reply:
        await asyncio.sleep(0.001)
        answers: list[Any] = []
        failed: list[Any] = []
        for parcel in parcels:
            rows = [row[0] for row in parcel.rows]
            if parcel.version == HANGS:
                await asyncio.sleep(0.05)
            elif parcel.version == GOOD:
                answers += [(row, [0.1, 0.9]) for row in rows]
            else:
                error = BankFull(FULL, 3) if parcel.version == FULL else RuntimeError("it broke")
                failed.append((rows, error))
        return {"replica": "r", "answers": answers, "failed": failed, "residency": None}


@pytest.fixture
def tasks(store: Directory, make_facts: Callable[..., Facts]) -> Tasks:
    model = Model(make_facts)
    return Tasks(Folders(store, model.describe, settle_s=0), model.describe)


@pytest.fixture
def predictor(tasks: Tasks, make_facts: Callable[..., Facts], tokenizer: Tokenizer) -> Predictor:
    return Predictor(tasks, tokenizer, Replicas(Model(make_facts)).ask, Room(100), max_rows=40)


async def cycles(work: Callable[[], Awaitable[Any]]) -> int:
    """Return how many objects are left in cycles by doing something many times."""
    await work()  # what is made once is made
    await asyncio.sleep(0.1)
    gc.collect()
    gc.disable()
    try:
        for _ in range(TIMES):
            await work()
        await asyncio.sleep(0.1)
        return gc.collect()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("versions", "fallback", "error"),
    [
        ((GOOD,), None, None),
        ((REFUSED,), None, AdapterRefused),
        ((REFUSED, GOOD), GOOD, None),
        ((REFUSED, REFUSED_TOO), REFUSED_TOO, AdapterRefused),
        ((FAILS,), None, RuntimeError),
        ((FULL,), None, BankFull),
        ((HANGS,), None, TooLate),
    ],
)
async def test_a_version_that_cannot_answer(
    tasks: Tasks,
    predictor: Predictor,
    make_record: Callable[..., TaskRecord],
    versions: tuple[str, ...],
    fallback: str | None,
    error: type[Exception] | None,
) -> None:
    tasks.snapshot = Snapshot(revision=1, tasks={"mood": make_record(*versions, fallback=fallback)})
    told: list[type[Exception] | None] = []

    async def ask() -> None:
        request = PredictRequest.model_validate({"texts": ["w1"]})
        deadline_s = asyncio.get_running_loop().time() + 0.02 if HANGS in versions else None
        try:
            await predictor.predict("mood", request, None, deadline_s)
            told.append(None)
        except (AdapterError, RequestError, RuntimeError) as raised:
            told.append(type(raised))

    assert await cycles(ask) == 0
    assert told == [error] * (1 + TIMES)


async def test_a_version_that_is_asked_for_again_and_again(
    make_facts: Callable[..., Facts], make_record: Callable[..., TaskRecord]
) -> None:
    described, record = Described(Model(make_facts).describe, retry_s=0), make_record(REFUSED)

    async def ask() -> None:
        with contextlib.suppress(AdapterRefused):
            await described.get("mood", REFUSED, record)
            raise AssertionError("it was had")

    assert await cycles(ask) == 0


async def test_a_store_that_is_away(store: Directory, make_facts: Callable[..., Facts]) -> None:
    class Away(Directory):
        def tasks(self) -> list[str]:
            raise StoreUnreachable("s3://there", "it is away")

    folders = Folders(Away(store.root), Model(make_facts).describe, list_every_s=0)

    async def ask() -> None:
        with contextlib.suppress(StoreUnreachable):
            await folders.names()
            raise AssertionError("it was listed")

    assert await cycles(ask) == 0


async def test_a_task_that_is_not_there(predictor: Predictor, tasks: Tasks) -> None:
    api = make_api(tasks, predictor, default_task=None, max_body_bytes=1024, max_upload_bytes=1024)
    path = "/v1/tasks/nobody/predict"
    scope = {
        **{"type": "http", "method": "POST", "path": path, "query_string": b""},
        "headers": [(b"content-type", b"application/json")],
    }
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"texts": ["w1"]}', "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        statuses.append(message.get("status", 0))

    assert await cycles(lambda: api(scope, receive, send)) == 0  # type: ignore[arg-type]
    assert statuses == [404, 0] * (1 + TIMES)


async def test_a_caller_that_hangs_up(
    tasks: Tasks, predictor: Predictor, make_record: Callable[..., TaskRecord]
) -> None:
    tasks.snapshot = Snapshot(revision=1, tasks={"mood": make_record(HANGS)})

    async def ask() -> None:
        request = PredictRequest.model_validate({"texts": ["w1"]})
        asking = asyncio.create_task(predictor.predict("mood", request))
        await asyncio.sleep(0.005)
        assert asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking

    assert await cycles(ask) == 0


@pytest.mark.parametrize(("num_texts", "error"), [(41, BadInput), (40, Overloaded)])
async def test_a_request_that_is_not_let_in(
    predictor: Predictor, num_texts: int, error: type[RequestError]
) -> None:
    predictor.check_room("mood")
    predictor._room.take("mood", 50)

    async def ask() -> None:
        request = PredictRequest.model_validate({"texts": ["w1"] * num_texts})
        with contextlib.suppress(error):
            await predictor.predict("mood", request)
            raise AssertionError("it was let in")

    assert await cycles(ask) == 0


async def test_what_others_leave_is_looked_for_while_little_is_asked() -> None:
    class Cycle:
        of_itself: "Cycle | None" = None

    def leave() -> weakref.ref[Cycle]:
        cycle = Cycle()
        cycle.of_itself = cycle
        return weakref.ref(cycle)

    early = Cycle()
    early_ref = weakref.ref(early)
    gc.disable()
    calm = False
    looking = asyncio.create_task(look_when_calm(lambda: calm, every_s=0.02))
    try:
        await asyncio.sleep(0.01)
        left = leave()
        await asyncio.sleep(0.1)
        assert left() is not None
        calm = True
        await asyncio.sleep(0.1)
        assert left() is None
        # What has outlived looks is looked for too.
        early.of_itself = early
        del early
        await asyncio.sleep(0.1)
        assert early_ref() is None
    finally:
        gc.enable()
        looking.cancel()
