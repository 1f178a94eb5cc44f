import json
from collections.abc import Iterator
from typing import Any

import pytest

from adapters.directory import Directory
from adapters.errors import TaskNotFound, VersionNotFound
from deployments.errors import Conflict, NotReady, Stale
from deployments.ingress.residency import merge
from tests.ingress.server import Server, problem, serve


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(Directory(tmp_path_factory.mktemp("store"))) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    running.catalog.__init__(running.catalog.store)
    return running


CALLS = [
    ("PATCH", "/v1/tasks/mood", {"pinned": True}, {"call": "patch", "patch": {"pinned": True}}),
    ("POST", "/v1/tasks/mood/rollback", None, {"call": "rollback"}),
    ("DELETE", "/v1/tasks/mood", None, {"call": "delete", "version": None}),
    ("DELETE", "/v1/tasks/mood/versions/0123abcd", None,
     {"call": "delete", "version": "0123abcd"}),
]  # fmt: skip
every_call = pytest.mark.parametrize(("method", "path", "body", "asked"), CALLS)


@every_call
def test_a_change_is_asked_of_the_catalog_and_its_answer_told(
    server: Server, method: str, path: str, body: Any, asked: dict[str, Any]
) -> None:
    response = server.http.request(method, path, json=body)
    assert response.status_code == 200, response.text
    expected = {"task": "mood", "by": "local", "if_match": None, **asked}
    assert server.catalog.asked == [expected]
    assert response.json() == {**expected, **server.catalog.answer}
    assert response.headers["etag"] == '"7"'
    assert "location" not in response.headers


@every_call
@pytest.mark.parametrize(("given", "revision"), [('"5"', 5), ('"0"', 0), ("*", None)])
def test_the_condition_reaches_the_catalog(
    server: Server, method: str, path: str, body: Any, asked: Any, given: str, revision: int | None
) -> None:
    server.http.request(method, path, json=body, headers={"if-match": given})
    assert server.catalog.asked[0]["if_match"] == revision


@every_call
@pytest.mark.parametrize(
    "given",
    ["5", 'W/"5"', '"5", "6"', '"five"', '"-1"', '""', "", '"5', '"' + "9" * 19 + '"', '"²"'],
)
def test_a_condition_that_is_no_etag_of_ours_is_refused(
    server: Server, method: str, path: str, body: Any, asked: Any, given: str
) -> None:
    headers = [(b"if-match", given.encode())]
    said = problem(server.http.request(method, path, json=body, headers=headers), 422)
    assert "If-Match" in said
    assert server.catalog.asked == []


def test_a_change_that_is_not_everywhere_yet_is_told_so(server: Server) -> None:
    server.catalog.answer = {"revision": 12, "etag": 12, "everywhere": False, "created": True}
    response = server.http.post("/v1/tasks/mood/rollback")
    assert response.status_code == 202
    assert response.headers["location"] == "/v1/revisions/12"
    told = server.http.get(response.headers["location"])
    assert told.json() == {"revision": 12, "everywhere": False, "waiting_for": ["ingress-1"]}


@every_call
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Stale("it is at 9"), 412), (Conflict("it has traffic"), 409), (NotReady("away"), 503),
        (TaskNotFound("mood"), 404), (VersionNotFound("mood", "0123abcd"), 404),
    ],
)  # fmt: skip
def test_what_the_catalog_refuses_is_a_problem(
    server: Server, method: str, path: str, body: Any, asked: Any, error: Exception, status: int
) -> None:
    server.catalog.error = error
    response = server.http.request(method, path, json=body)
    assert problem(response, status) == str(error)
    assert ("retry-after" in response.headers) == (status == 503)


@pytest.mark.parametrize(
    "task", ["Mood", "-mood", "m" * 65, "mo od", "%2e%2e", "catalog", "mood%0a"]
)
def test_what_cannot_be_a_task_is_unknown(server: Server, task: str) -> None:
    for method, path in [
        ("PATCH", ""), ("DELETE", ""), ("POST", "/rollback"), ("DELETE", "/versions/0123abcd"),
        ("POST", "/versions"), ("PUT", "/versions"),
    ]:  # fmt: skip
        body = {"source": "s3://a/b"} if (method, path) == ("POST", "/versions") else {}
        response = server.http.request(method, f"/v1/tasks/{task}{path}", json=body)
        assert "cannot be a task" in problem(response, 404)
    assert server.catalog.asked == []


@pytest.mark.parametrize("version", ["0123ABCD", "0123abc", "0123abcde", "..", "xyzxyzxy"])
def test_what_cannot_be_a_version_is_unknown(server: Server, version: str) -> None:
    response = server.http.delete(f"/v1/tasks/mood/versions/{version.replace('.', '%2e')}")
    problem(response, 404)
    assert server.catalog.asked == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"threshold": 0.5}, "threshold: is not a known field"),
        ({"active": "latest"}, "active: "), ({"traffic": {"0123abcd": 2}}, "traffic: "),
        ({"traffic": {"v2": 0.5}}, "traffic: "), ({"shadow": "0123abcd"}, "shadow: "),
        ({"max_error_rate": -1}, "max_error_rate: "), ([], "the body must be a JSON object"),
    ],
)  # fmt: skip
def test_a_patch_that_is_wrong_says_in_what(server: Server, body: Any, said: str) -> None:
    assert problem(server.http.patch("/v1/tasks/mood", json=body), 422).startswith(said)
    assert server.catalog.asked == []


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ('{"max_length": 1180591620717411303424}', "64-bit"),
        ('{"labels": ["\\ud800"]}', "surrogates"), ('{"\\ud800": 1}', "surrogates"),
        ('{"threshold": NaN}', "not JSON compliant"), ('{"threshold": Infinity}', "not JSON"),
        ('{"threshold": {"yes": [1, -1e999]}}', "not JSON"),
        ('{"labels": ' + "[" * 300 + "]" * 300 + "}", "ecursion limit"),
    ],
)  # fmt: skip
def test_rules_that_the_catalog_cannot_keep_are_refused(
    server: Server, rules: str, said: str
) -> None:
    headers = {"content-type": "application/json"}
    body = f'{{"rules": {rules}}}'
    response = server.http.patch("/v1/tasks/mood", content=body, headers=headers)
    sentence = problem(response, 422)
    assert sentence.startswith("rules: they cannot be kept as JSON: ")
    assert said in sentence
    assert server.catalog.asked == []


@pytest.mark.parametrize(
    "body", [{"active": "v2"}, {"fallback": "0123ABCD"}, {"traffic": {"v2": 0.5}}]
)
def test_what_is_no_version_is_told_in_words(server: Server, body: Any) -> None:
    said = problem(server.http.patch("/v1/tasks/mood", json=body), 422)
    assert "is no version: 8 hex digits, as GET /v1/tasks/{task} lists them" in said


@pytest.mark.parametrize("body", ['{"\\ud800": 1}', '{"active": "\\ud800"}', "[" * 3000])
def test_text_that_is_none_is_the_callers_mistake(server: Server, body: str) -> None:
    headers = {"content-type": "application/json"}
    response = server.http.patch("/v1/tasks/mood", content=body, headers=headers)
    assert response.status_code in (400, 422), response.text


def test_a_patch_says_null_apart_from_nothing(server: Server) -> None:
    patch = {"shadow": None, "fallback": None, "rules": {"threshold": None}, "traffic": {}}
    server.http.patch("/v1/tasks/mood", json=patch)
    assert server.catalog.asked[0]["patch"] == patch


def test_a_patch_over_the_limit_of_bodies_is_cut_off(server: Server) -> None:
    body = json.dumps({"rules": {"x": "y" * 5000}})
    assert "max_body_bytes" in problem(
        server.http.patch(
            "/v1/tasks/mood", content=body, headers={"content-type": "application/json"}
        ),
        413,
    )


def test_history_goes_back_page_by_page(server: Server) -> None:
    server.catalog.changes = [
        {"revision": revision, "task": ("spam", "mood")[revision % 2]}
        for revision in range(9, 0, -1)
    ]
    assert pages(server, "/v1/history", limit=4) == [[9, 8, 7, 6], [5, 4, 3, 2], [1]]
    assert pages(server, "/v1/history", task="mood", limit=5) == [[9, 7, 5, 3, 1]]
    assert pages(server, "/v1/history", task="none") == [[]]
    problem(server.http.get("/v1/history?limit=0"), 422)
    problem(server.http.get("/v1/history?before=0"), 422)


def pages(server: Server, path: str, **query: Any) -> list[list[int]]:
    found = []
    while True:
        answer = server.http.get(path, params=query).json()
        found.append([change["revision"] for change in answer["changes"]])
        if "next" not in answer:
            return found
        query["before"] = answer["next"]


class Replica:
    """Holds versions, and tells of them as a model replica does."""

    def __init__(self, name: str, held: list[str]) -> None:
        self.name = name
        self.held = sorted(held)

    def page(self, after: str, limit: int) -> dict[str, Any]:
        rest = [name for name in self.held if name > after]
        versions = [
            dict(zip(("task", "version"), [*name.split("@"), None], strict=False), where="slot")
            for name in rest[:limit]
        ]
        told = {"replica": self.name, "slots_free": 1, "pages_free": 2, "versions": versions}
        return {**told, "next": rest[limit - 1]} if len(rest) > limit else told


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_residency_over_all_replicas_loses_none_at_the_ends_of_pages(limit: int) -> None:
    names = [f"t-{number:02}@{number:08x}" for number in range(20)]
    names[3:9:2] = ["t-03", "t-05", "t-07"]  # what could not be loaded, of no known version
    replicas = [
        Replica("a", names[::2]), Replica("b", names[5:]), Replica("c", []), Replica("d", names[:3])
    ]  # fmt: skip
    after, told = "", dict[str, set[str]]()
    while True:
        answer = merge([replica.page(after, limit) for replica in replicas], limit)
        assert len(answer["versions"]) <= limit
        for entry in answer["versions"]:
            name = "@".join(filter(None, (entry["task"], entry["version"])))
            assert name not in told
            told[name] = set(entry["replicas"])
        if "next" not in answer:
            break
        after = answer["next"]
    held = {replica.name: replica.held for replica in replicas}
    assert told == {
        name: {replica for replica in held if name in held[replica]}
        for name in names
        if any(name in held[replica] for replica in held)
    }


def test_residency_says_where_each_replica_has_a_version(server: Server) -> None:
    one = {"task": "mood", "version": "0123abcd"}
    server.pages = [
        {"replica": "b", "slots_free": None, "pages_free": 9,
         "versions": [{**one, "where": "failed", "until_s": 12.5}], "next": None},
        {"replica": "a", "slots_free": 3, "pages_free": 8, "versions": [{**one, "where": "slot"}]},
    ]  # fmt: skip
    assert server.http.get("/v1/residency").json() == {
        "replicas": [
            {"replica": "a", "slots_free": 3, "pages_free": 8},
            {"replica": "b", "slots_free": None, "pages_free": 9},
        ],
        "versions": [
            {**one, "replicas": {"b": {"where": "failed", "until_s": 12.5}, "a": {"where": "slot"}}}
        ],
    }


def test_the_documentation_shows_how_to_upload_and_where_the_token_goes(server: Server) -> None:
    spec = server.http.get("/openapi.json").json()
    upload = spec["paths"]["/v1/tasks/{task}/versions"]["put"]
    assert "multipart/form-data" in upload["requestBody"]["content"]
    assert upload["security"]
    assert "security" not in spec["paths"]["/v1/history"]["get"]


CHANGES = [
    ("put", "/v1/tasks/{task}/versions"), ("post", "/v1/tasks/{task}/versions"),
    ("patch", "/v1/tasks/{task}"), ("post", "/v1/tasks/{task}/rollback"),
    ("delete", "/v1/tasks/{task}"), ("delete", "/v1/tasks/{task}/versions/{version}"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_the_documentation_lists_a_change_s_condition_and_answers(
    server: Server, method: str, path: str
) -> None:
    said = server.http.get("/openapi.json").json()["paths"][path][method]
    (header,) = [one for one in said["parameters"] if one["in"] == "header"]
    assert (header["name"], header["required"]) == ("If-Match", False)
    answers = said["responses"]
    assert ("201" in answers) == path.endswith("/versions")
    assert "Location" in answers["202"]["headers"]
    for status in ("401", "403", "404", "409", "412", "413", "422", "503"):
        assert [*answers[status]["content"]] == ["application/problem+json"], status


def test_only_changes_are_documented_as_such(server: Server) -> None:
    for path, routes in server.http.get("/openapi.json").json()["paths"].items():
        for method, said in routes.items():
            assert ("412" in said["responses"]) == ((method, path) in CHANGES)
