from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from adapters.directory import Directory
from adapters.errors import AdapterRefused
from deployments.ingress.routes import make_api
from deployments.ingress.tasks import Tasks
from deployments.rows import Facts


@pytest.fixture
def described() -> list[str]:
    """The tasks that the model was asked about."""
    return []


@pytest.fixture
async def http(
    store: Directory, make_facts: Callable[..., Facts], described: list[str]
) -> AsyncIterator[httpx2.AsyncClient]:
    async def describe(task: str) -> Facts:
        described.append(task)
        if task == "t-3":
            raise AdapterRefused(task, ["no head"])
        return make_facts(task=task, version=store.read(task).version)

    tasks = Tasks(store, describe, settle_s=0)
    api = make_api(tasks, None, default_task=None, max_body_bytes=1024, max_upload_bytes=1024)
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
