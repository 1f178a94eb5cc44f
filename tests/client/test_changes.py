import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from adapters.directory import Directory
from adapters.store import READ
from onebase_client import Client, OnebaseError
from onebase_client.files import NAMES
from tests.ingress.server import Server, serve


class Recorder:
    """Answers all requests by a function, and keeps them."""

    def __init__(
        self, answer: Callable[[httpx2.Request], dict[str, Any]] = lambda _: {}, **options: Any
    ) -> None:
        self.answer = answer
        self.requests: list[httpx2.Request] = []
        transport = httpx2.MockTransport(self)
        self.client = Client("http://onebase.test", transport=transport, **options)

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        self.requests.append(request)
        return httpx2.Response(200, json=self.answer(request))

    @property
    def last(self) -> tuple[str, str, Any]:
        """Method, path with query, and JSON of the last request."""
        request = self.requests[-1]
        body = json.loads(request.content) if request.content else None
        return request.method, request.url.raw_path.decode(), body


@pytest.mark.parametrize(
    ("call", "sent"),
    [
        (lambda c, **o: c.add("mood", "s3://b/f", **o),
         ("POST", "/v1/tasks/mood/versions", {"source": "s3://b/f", "activate": False})),
        (lambda c, **o: c.add("mood", "s3://b/f", activate=True, **o),
         ("POST", "/v1/tasks/mood/versions", {"source": "s3://b/f", "activate": True})),
        (lambda c, **o: c.update("mood", pinned=True, shadow=None, **o),
         ("PATCH", "/v1/tasks/mood", {"pinned": True, "shadow": None})),
        (lambda c, **o: c.rollback("mood", **o), ("POST", "/v1/tasks/mood/rollback", None)),
        (lambda c, **o: c.delete("mood", **o), ("DELETE", "/v1/tasks/mood", None)),
        (lambda c, **o: c.delete("a/b", "0123abcd", **o),
         ("DELETE", "/v1/tasks/a%2Fb/versions/0123abcd", None)),
    ],
)  # fmt: skip
def test_a_change_goes_to_its_route_with_its_condition(call: Any, sent: Any) -> None:
    recorder = Recorder()
    call(recorder.client)
    assert recorder.last == sent
    assert "if-match" not in recorder.requests[-1].headers
    call(recorder.client, if_match=0)
    assert recorder.last == sent
    assert recorder.requests[-1].headers["if-match"] == '"0"'


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_a_name_that_would_be_another_path_is_not_sent(name: str) -> None:
    recorder = Recorder()
    for call in (recorder.client.rollback, recorder.client.task):
        with pytest.raises(ValueError, match=r"nothing|empty"):
            call(name)
    with pytest.raises(ValueError, match="nothing"):
        recorder.client.delete("mood", name)
    assert recorder.requests == []


def test_the_token_goes_with_every_request_and_no_token_with_none() -> None:
    recorder = Recorder()
    recorder.client.rollback("mood")
    assert "authorization" not in recorder.requests[-1].headers
    transport = httpx2.MockTransport(recorder)
    Client("http://onebase.test", transport=transport, token="secret").rollback("mood")
    assert recorder.requests[-1].headers["authorization"] == "Bearer secret"


def test_a_change_is_waited_for_longer_than_an_answer(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for options, change_s, answer_s in [
        ({}, 300, 30), ({"timeout_s": 1, "change_timeout_s": 2}, 2, 1)
    ]:  # fmt: skip
        recorder = Recorder(lambda _: {"tasks": [], "changes": []}, **options)
        client = recorder.client
        for call in (
            lambda c: c.upload("mood", tmp_path), lambda c: c.add("mood", "s3://b/f"),
            lambda c: c.update("mood", pinned=True), lambda c: c.rollback("mood"),
            lambda c: c.delete("mood"), lambda c: c.delete("mood", "0123abcd"),
        ):  # fmt: skip
            call(client)
            assert recorder.requests[-1].extensions["timeout"]["read"] == change_s
        for call in (
            lambda c: c.predict("mood", "good"), lambda c: c.tasks(), lambda c: c.history()
        ):  # fmt: skip
            call(client)
            assert recorder.requests[-1].extensions["timeout"]["read"] == answer_s


def test_a_token_that_no_header_can_carry_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="The token has characters that are not ASCII"):
        Client(token="gehëim")


def test_a_routing_key_is_sent_when_there_is_one() -> None:
    recorder = Recorder()
    recorder.client.predict("mood", "good", routing_key="user 7")
    assert recorder.requests[-1].headers["x-routing-key"] == "user 7"
    recorder.client.predict("mood", "good")
    assert "x-routing-key" not in recorder.requests[-1].headers


def test_history_is_asked_for_page_by_page_until_there_is_enough() -> None:
    def answer(request: httpx2.Request) -> dict[str, Any]:
        query = dict(request.url.params)
        first = int(query.get("before", 2501)) - 1
        last = max(first - int(query["limit"]), 0)
        changes = [{"revision": n, "task": query.get("task")} for n in range(first, last, -1)]
        return {"changes": changes, **({"next": last + 1} if last else {})}

    recorder = Recorder(answer)
    assert [c["revision"] for c in recorder.client.history(limit=3)] == [2500, 2499, 2498]
    assert recorder.last[1] == "/v1/history?limit=3"
    assert len(recorder.client.history(limit=2000)) == 2000
    assert [c["revision"] for c in recorder.client.history("a&b", limit=9999)][-1] == 1
    assert recorder.requests[3].url.params["task"] == "a&b"


def test_residency_is_one_answer_however_many_pages_it_fills() -> None:
    pages = {"": ([1, 2], "b@2"), "b@2": ([3], None)}

    def answer(request: httpx2.Request) -> dict[str, Any]:
        versions, following = pages[request.url.params.get("after", "")]
        told = {"replicas": ["r"], "versions": versions}
        return told if following is None else {**told, "next": following}

    assert Recorder(answer).client.residency() == {"replicas": ["r"], "versions": [1, 2, 3]}


def test_the_client_knows_the_files_that_the_store_takes() -> None:
    assert sorted(NAMES) == sorted(READ)


def test_a_folder_without_an_adapter_is_not_sent(tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        recorder.client.upload("mood", tmp_path)
    assert recorder.requests == []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serve(Directory(tmp_path / "store"), token="secret") as server:
        yield server


def test_a_folder_and_its_content_arrive_alike(server: Server, tmp_path: Path) -> None:
    length = (8).to_bytes(8, "little")
    content = {
        "adapter_config.json": b"{}", "adapter_model.safetensors": length + b"{}      ",
        "task.json": b"{}",
    }  # fmt: skip
    folder = tmp_path / "trained"
    (folder / "checkpoint-1").mkdir(parents=True)
    for name, data in {**content, "README.md": b"x", "optimizer.pt": b"y"}.items():
        (folder / name).write_bytes(data)
    with Client(str(server.http.base_url), token="secret") as client:
        for given in (folder, str(folder), content):
            answer = client.upload("mood", given, activate=True, if_match=4)
            assert answer["etag"] == 7
    assert server.catalog.published == [content] * 3
    assert server.catalog.asked[0] == server.catalog.asked[1] == server.catalog.asked[2]
    assert server.catalog.asked[0]["activate"] is True
    assert (server.catalog.asked[0]["if_match"], server.catalog.asked[0]["by"]) == (4, "token")


def test_what_the_server_refuses_is_raised(server: Server) -> None:
    base_url = str(server.http.base_url)
    with Client(base_url) as client, pytest.raises(OnebaseError, match="401 Unauthorized"):
        client.rollback("mood")
    with Client(base_url, token="secret") as client:
        with pytest.raises(OnebaseError, match=r"422 .*'notes.txt'"):
            client.upload("mood", {"notes.txt": b"x"})
        with pytest.raises(OnebaseError, match=r"413 .*max_upload_bytes"):
            client.upload("mood", {"adapter_model.safetensors": bytes(2**25)})
        with pytest.raises(OnebaseError, match=r"403 .*allowed_sources"):
            client.add("mood", "s3://bucket/folder")
