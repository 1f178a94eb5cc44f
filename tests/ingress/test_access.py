from collections.abc import Iterator

import pytest

from adapters.directory import Directory
from deployments.config import ConfigError, admin_token
from deployments.errors import Forbidden, Unauthorized
from deployments.ingress.access import Access
from tests.ingress.server import problem, serve

CHANGES = [
    ("PUT", "/v1/tasks/mood/versions"), ("POST", "/v1/tasks/mood/versions"),
    ("PATCH", "/v1/tasks/mood"), ("POST", "/v1/tasks/mood/rollback"),
    ("DELETE", "/v1/tasks/mood"), ("DELETE", "/v1/tasks/mood/versions/11111111"),
]  # fmt: skip
every_change = pytest.mark.parametrize(("method", "path"), CHANGES)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST"])
def test_on_loopback_and_without_a_token_anybody_here_may(host: str) -> None:
    assert Access(host, None).check(None) == "local"


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "10.1.2.3", "192.168.0.1", "example.com", "localhost.evil.com", "", "127.1"],
)
def test_elsewhere_and_without_a_token_nobody_may(host: str) -> None:
    with pytest.raises(Forbidden, match="ONEBASE_ADMIN_TOKEN"):
        Access(host, None).check("Bearer anything")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Bearer secre", "Bearer secret2",
              "Basic secret", "secret", "Bearer sécret", "Bearer secret secret"],
)  # fmt: skip
def test_a_token_that_is_set_is_always_needed(host: str, given: str | None) -> None:
    access = Access(host, "secret")
    with pytest.raises(Unauthorized):
        access.check(given)
    assert access.check("Bearer secret") == access.check("bearer  secret ") == "token"


@pytest.mark.parametrize(
    "origin", ["https://evil.com", "null", "http://[", "http://127.0.0.1.evil.com"]
)
def test_a_page_of_another_site_may_not_use_an_open_server(origin: str) -> None:
    access = Access("127.0.0.1", None)
    with pytest.raises(Forbidden, match="page"):
        access.check(None, origin)
    assert access.check(None, "http://localhost:8000") == "local"
    assert Access("127.0.0.1", "secret").check("Bearer secret", origin) == "token"


@pytest.mark.parametrize("value", ["", " ", "a b", "a\n", "é"])
def test_a_token_that_is_none_stops_the_start(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ONEBASE_ADMIN_TOKEN", value)
    with pytest.raises(ConfigError, match="ONEBASE_ADMIN_TOKEN"):
        admin_token()


def test_the_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEBASE_ADMIN_TOKEN", raising=False)
    assert admin_token() is None
    monkeypatch.setenv("ONEBASE_ADMIN_TOKEN", "secret")
    assert admin_token() == "secret"


@every_change
def test_every_route_that_changes_something_asks_for_the_token(
    store: Directory, method: str, path: str
) -> None:
    with serve(store, token="secret") as server:
        # The body is wrong too: who may not change anything is told no more than that.
        response = server.http.request(method, path, content=b"{", headers={"if-match": "odd"})
        assert "token" in problem(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
        response = server.http.request(method, path, headers={"authorization": "Bearer wrong"})
        problem(response, 401)
        response = server.http.request(
            method, path, content=b"{", headers={"authorization": "Bearer secret"}
        )
        assert response.status_code not in (401, 403)
    if response.status_code == 200:
        assert server.catalog.asked[0]["by"] == "token"


@every_change
def test_no_header_opens_a_server_that_listens_to_others(
    store: Directory, method: str, path: str
) -> None:
    # The peer is 127.0.0.1 here, as it is behind a proxy.
    headers = {
        "x-forwarded-for": "127.0.0.1", "x-real-ip": "127.0.0.1", "forwarded": "for=127.0.0.1",
        "host": "127.0.0.1", "authorization": "Bearer x",
    }  # fmt: skip
    with serve(store, host="0.0.0.0") as server:
        assert "ONEBASE_ADMIN_TOKEN" in problem(
            server.http.request(method, path, headers=headers), 403
        )
        assert server.catalog.asked == []


def test_what_only_tells_is_open(store: Directory) -> None:
    with serve(store, host="0.0.0.0", token="secret") as server:
        for path in ("/v1/history", "/v1/residency", "/v1/revisions/3"):
            assert server.http.get(path).status_code == 200


def test_an_upload_without_the_token_is_not_read(store: Directory) -> None:
    num_sent = 0

    def body() -> Iterator[bytes]:
        nonlocal num_sent
        for _ in range(1000):
            num_sent += 1
            yield bytes(2**20)

    with serve(store, token="secret", max_upload_bytes=2**30) as server:
        problem(server.http.put("/v1/tasks/mood/versions", content=body()), 401)
    assert num_sent < 100
