import json
import pickle
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from onebase_client import Client, OnebaseError


class Server:
    """Answers every request alike and keeps the requests."""

    def __init__(self, answer: Callable[[], httpx2.Response]) -> None:
        self.answer = answer
        self.requests: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        return self.answer()

    @property
    def request(self) -> httpx2.Request:
        """The only request that came."""
        (request,) = self.requests
        return request

    @property
    def body(self) -> Any:
        return json.loads(self.request.content)


def serving(status: int = 200, **response: Any) -> Server:
    return Server(lambda: httpx2.Response(status, **response))


def client_of(server: Server, base_url: str = "http://onebase.test") -> Client:
    return Client(base_url, transport=httpx2.MockTransport(server))


def test_predict_posts_the_texts_and_returns_the_answer() -> None:
    answer = {"task": "sentiment", "predictions": [{"label": "Positive"}, {"label": "Negative"}]}
    server = serving(json=answer)
    with client_of(server) as client:
        assert client.predict("sentiment", ("good", "bad")) == answer
    assert server.request.method == "POST"
    assert str(server.request.url) == "http://onebase.test/v1/tasks/sentiment/predict"
    assert server.request.headers["content-type"] == "application/json"
    assert server.body == {"texts": ["good", "bad"], "return_scores": False}


def test_a_single_string_is_one_text() -> None:
    server = serving(json={})
    client_of(server).predict("sentiment", "good")
    assert server.body["texts"] == ["good"]


def test_pairs_are_sent_as_they_are() -> None:
    pair = {"text": "a dog runs", "text_pair": "an animal moves"}
    for given in (pair, [pair]):
        server = serving(json={})
        client_of(server).predict("nli", given)
        assert server.body["texts"] == [pair]


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_scores_and_threshold_are_sent_when_asked_for(threshold: float) -> None:
    server = serving(json={})
    client_of(server).predict("sentiment", "good", return_scores=True, threshold=threshold)
    assert server.body == {"texts": ["good"], "return_scores": True, "threshold": threshold}


@pytest.mark.parametrize(
    ("tasks", "sent"),
    [
        (("a", "b"), ["a", "b"]),
        ("spam", ["spam"]),
        ({"match": "guard-*"}, {"match": "guard-*"}),
    ],
)
def test_predict_many_posts_tasks_and_texts_and_returns_the_answer(tasks: Any, sent: Any) -> None:
    answer = {"answers": {"a": {"results": []}, "b": {"error": "no", "status": 404}}}
    server = serving(json=answer)
    said = client_of(server).predict_many(
        tasks, "good", return_scores=True, threshold=0.5, routing_key="user-7"
    )
    assert said == answer
    assert (server.request.method, server.request.url.path) == ("POST", "/v1/predict")
    assert server.request.headers["x-routing-key"] == "user-7"
    assert server.body == {
        "tasks": sent, "texts": ["good"], "return_scores": True, "threshold": 0.5,
    }  # fmt: skip


def test_tasks_returns_the_list() -> None:
    server = serving(json={"tasks": [{"name": "spam"}, {"name": "topic"}]})
    assert client_of(server).tasks() == [{"name": "spam"}, {"name": "topic"}]
    assert (server.request.method, server.request.url.path) == ("GET", "/v1/tasks")
    assert server.request.content == b""


def test_tasks_asks_for_one_page_after_the_other() -> None:
    pages = iter([{"tasks": [{"task": "a"}], "next": "a"}, {"tasks": [{"task": "b"}]}])
    server = Server(lambda: httpx2.Response(200, json=next(pages)))
    assert client_of(server).tasks() == [{"task": "a"}, {"task": "b"}]
    assert [request.url.query for request in server.requests] == [b"", b"after=a"]


def test_task_returns_the_one() -> None:
    server = serving(json={"name": "spam"})
    assert client_of(server).task("spam") == {"name": "spam"}
    assert (server.request.method, server.request.url.path) == ("GET", "/v1/tasks/spam")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a/b?c#d", b"/v1/tasks/a%2Fb%3Fc%23d"),
        ("50%", b"/v1/tasks/50%25"),
        ("größe", b"/v1/tasks/gr%C3%B6%C3%9Fe"),
        ("spam@3f2a9c1b", b"/v1/tasks/spam@3f2a9c1b"),
    ],
)
def test_a_name_stays_one_part_of_the_path(name: str, path: bytes) -> None:
    server = serving(json={})
    client_of(server).task(name)
    assert server.request.url.raw_path == path


def test_an_empty_name_is_refused_before_anything_is_sent() -> None:
    server = serving(json={})
    with pytest.raises(ValueError, match="empty"):
        client_of(server).task("")
    assert server.requests == []


def test_the_path_of_the_base_url_goes_before_the_routes() -> None:
    server = serving(json={"tasks": []})
    client_of(server, "http://onebase.test/models/").tasks()
    assert server.request.url.path == "/models/v1/tasks"


def test_a_problem_becomes_an_error_with_its_parts() -> None:
    server = serving(
        404,
        headers={"content-type": "application/problem+json"},
        content=json.dumps(
            {"status": 404, "title": "Unknown task", "detail": "There is no task 'spma'."}
        ),
    )
    with pytest.raises(OnebaseError) as caught:
        client_of(server).predict("spma", "good")
    error = caught.value
    assert (error.status, error.title) == (404, "Unknown task")
    assert error.detail == "There is no task 'spma'."
    assert str(error) == "404 Unknown task: There is no task 'spma'."


@pytest.mark.parametrize(
    "response",
    [
        {"html": "<h1>503 Service Unavailable</h1>"},
        {"content": b""},
        {"json": ["not", "a", "problem"]},
        {"json": {"detail": None}},
    ],
    ids=["html", "empty", "list", "no-members"],
)
def test_a_refusal_without_problem_details_is_told_by_its_status(response: Any) -> None:
    with pytest.raises(OnebaseError) as caught:
        client_of(serving(503, **response)).tasks()
    assert str(caught.value) == "503 Service Unavailable"


def test_a_redirect_is_no_answer() -> None:
    server = serving(307, headers={"location": "http://elsewhere.test/"})
    with pytest.raises(OnebaseError, match="307 Temporary Redirect"):
        client_of(server).tasks()


@pytest.mark.parametrize("response", [{"html": "<h1>Hello</h1>"}, {"json": []}])
def test_a_success_of_another_server_is_an_error(response: Any) -> None:
    with pytest.raises(OnebaseError, match="Not a onebase answer"):
        client_of(serving(**response)).task("spam")


def test_no_answer_is_a_transport_error() -> None:
    def unreachable() -> httpx2.Response:
        raise httpx2.ConnectError("refused")

    with pytest.raises(httpx2.TransportError, match="refused"):
        client_of(Server(unreachable)).tasks()


def test_the_timeout_reaches_every_phase() -> None:
    server = serving(json={"tasks": []})
    with Client(timeout_s=1.5, transport=httpx2.MockTransport(server)) as client:
        client.tasks()
    assert set(server.request.extensions["timeout"].values()) == {1.5}
    assert server.request.url.host == "127.0.0.1"


def test_a_closed_client_refuses() -> None:
    with client_of(serving(json={"tasks": []})) as client:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        client.tasks()


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(OnebaseError(422, "Too long", "Row 3 has 9,000 tokens.")))
    assert (error.status, error.title, error.detail) == (422, "Too long", "Row 3 has 9,000 tokens.")
