import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from adapters.directory import Directory
from adapters.errors import AdapterRefused
from deployments.ingress.folders import Folders
from deployments.ingress.routes import make_api
from deployments.ingress.tasks import Tasks
from deployments.rows import Facts
from deployments.snapshot import Snapshot, TaskRecord

Record = Callable[..., TaskRecord]


@pytest.fixture
def described() -> list[str]:
    """The tasks that the model was asked about."""
    return []


@pytest.fixture
def tasks(store: Directory, make_facts: Callable[..., Facts], described: list[str]) -> Tasks:
    async def describe(task: str, version: str | None = None, rules: Any = None) -> Facts:
        described.append(task)
        if task in ("t-3", "bad"):
            raise AdapterRefused(task, ["no head"])
        found = version or store.read(task).version
        return make_facts(task=task, version=found, rules="0123abcd" if rules else "44136fa3")

    return Tasks(Folders(store, describe, settle_s=0), describe)


@pytest.fixture
def usage() -> dict[str, Any]:
    """What the catalog counted; `away` makes it not answer."""
    return {}


@pytest.fixture
async def http(tasks: Tasks, usage: dict[str, Any]) -> AsyncIterator[httpx2.AsyncClient]:
    async def ask_usage(names: list[str]) -> dict[str, Any] | None:
        return None if "away" in usage else {n: usage[n] for n in names if n in usage}

    api = make_api(
        tasks, None, default_task=None, max_body_bytes=1024, max_upload_bytes=1024, usage=ask_usage
    )
    transport = httpx2.ASGITransport(app=api)
    async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
        yield client


async def page(http: httpx2.AsyncClient, **query: Any) -> tuple[list[str], str | None]:
    answer = (await http.get("/v1/tasks", params=query)).json()
    return [task["task"] for task in answer["tasks"]], answer.get("next")


async def test_a_small_store_is_one_answer_without_more(
    write: Callable[..., Path], http: httpx2.AsyncClient
) -> None:
    for number in (2, 3, 1):
        write(f"t-{number}", number=number)
    answer = (await http.get("/v1/tasks")).json()
    assert list(answer) == ["tasks"]
    assert [task["task"] for task in answer["tasks"]] == ["t-1", "t-2", "t-3"]
    assert answer["tasks"][0]["version"]
    assert "no head" in answer["tasks"][2]["error"]


async def test_a_large_store_is_listed_page_by_page_and_described_no_further(
    write: Callable[..., Path], http: httpx2.AsyncClient, described: list[str]
) -> None:
    names = sorted(f"t-{number}" for number in range(1, 131))
    for number in range(1, 131):
        write(f"t-{number}", number=number)
    assert await page(http) == (names[:100], names[99])
    assert sorted(described) == names[:100]
    assert await page(http, after=names[99]) == (names[100:], None)
    assert await page(http, limit=2) == (names[:2], names[1])
    assert await page(http, limit=2, after="t-10") == (["t-100", "t-101"], "t-101")
    assert await page(http, limit=130) == (names, None)
    assert await page(http, after="zzz") == ([], None)


@pytest.mark.parametrize("limit", ["0", "1001", "many"])
async def test_a_limit_that_is_none_is_refused(http: httpx2.AsyncClient, limit: str) -> None:
    response = await http.get("/v1/tasks", params={"limit": limit})
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert "limit" in response.json()["detail"]


A, B = "aaaaaaaa", "bbbbbbbb"


def install(tasks: Tasks, **records: TaskRecord) -> None:
    tasks.snapshot = Snapshot(revision=7, tasks=records)


async def test_a_managed_task_says_all_that_the_catalog_knows_beside_its_facts(
    http: httpx2.AsyncClient, tasks: Tasks, make_record: Record
) -> None:
    record = make_record(
        A, B, revision=5, traffic={B: 0.25}, max_error_rate=0.1, fallback=B, previous=[B],
        shadow={"version": B, "share": 0.5}, pinned=True, rules={"threshold": 0.5},
    )  # fmt: skip
    install(tasks, mood=record)
    response = await http.get("/v1/tasks/mood")
    assert response.headers["etag"] == '"5"'
    came = {"created_s": 1.0, "by": "me", "source": "upload"}
    managed = {
        "task": "mood", "version": A, "etag": 5, "revision": 7, "active": A,
        "versions": {A: came, B: came}, "previous": [B], "traffic": {B: 0.25},
        "max_error_rate": 0.1, "shadow": {"version": B, "share": 0.5}, "fallback": B,
        "pinned": True, "overrides": {"threshold": 0.5}, "usage": {},
    }  # fmt: skip
    facts = {"labels": ["no", "yes"], "rules": "0123abcd", "method": "lora", "rank": 8}
    told = response.json()
    assert told.items() >= (managed | facts).items()
    (listed,) = (await http.get("/v1/tasks")).json()["tasks"]
    assert listed == told


async def test_a_plain_folder_has_etag_0_and_no_versions(
    http: httpx2.AsyncClient, write: Callable[..., Path]
) -> None:
    write("mood")
    response = await http.get("/v1/tasks/mood")
    assert response.headers["etag"] == '"0"'
    assert not {"etag", "versions", "active"} & response.json().keys()


async def test_a_managed_task_that_cannot_be_served_is_shown_and_says_why(
    http: httpx2.AsyncClient, tasks: Tasks, make_record: Record
) -> None:
    install(tasks, bad=make_record(A, B))
    response = await http.get("/v1/tasks/bad")
    assert response.status_code == 200
    assert "no head" in response.json()["error"]
    assert set(response.json()["versions"]) == {A, B}
    (listed,) = (await http.get("/v1/tasks")).json()["tasks"]
    assert "no head" in listed["error"]


async def test_folders_and_managed_tasks_are_paged_together(
    http: httpx2.AsyncClient, tasks: Tasks, make_record: Record, write: Callable[..., Path],
    described: list[str],
) -> None:  # fmt: skip
    for name in ("a", "c", "d", "gone"):
        write(name)
    install(tasks, b=make_record(A), d=make_record(B), gone=make_record(A, deleted=True))
    assert await page(http, limit=2) == (["a", "b"], "b")
    assert await page(http, limit=2, after="b") == (["c", "d"], None)
    assert sorted(described) == ["a", "c"]
    assert (await http.get("/v1/tasks/gone")).status_code == 404


async def test_a_doomed_version_is_not_shown(
    http: httpx2.AsyncClient, tasks: Tasks, make_record: Record
) -> None:
    install(tasks, mood=make_record(A, B, doomed=[B]))
    assert list((await http.get("/v1/tasks/mood")).json()["versions"]) == [A]


async def test_usage_is_the_catalog_s_and_null_while_it_is_away(
    http: httpx2.AsyncClient, tasks: Tasks, make_record: Record, write: Callable[..., Path],
    usage: dict[str, Any],
) -> None:  # fmt: skip
    write("folder")
    install(tasks, mood=make_record(A))
    usage["mood"] = {A: {"num_rows": 3}}
    told = (await http.get("/v1/tasks")).json()["tasks"]
    assert [one["usage"] for one in told] == [{}, usage["mood"]]
    assert (await http.get("/v1/tasks/mood")).json()["usage"] == usage["mood"]
    usage["away"] = True
    told = (await http.get("/v1/tasks")).json()["tasks"]
    assert [one["usage"] for one in told] == [None, None]


async def test_a_thousand_managed_tasks_are_listed_without_a_load(
    http: httpx2.AsyncClient, tasks: Tasks, make_record: Record, described: list[str]
) -> None:
    names = sorted(f"t-{n}" for n in range(1000))
    install(tasks, **{name: make_record(A, B) for name in names})
    started_s = time.monotonic()
    assert await page(http, limit=1000) == (names, None)
    assert time.monotonic() - started_s < 1  # 25 ms here
    assert described == []
