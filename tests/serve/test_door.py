"""Too much at once, callers that go, and deadlines, over HTTP and by handle."""

import http.client
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOM = 128
# A request counts as four rows. One of another task is in the forward, and half of what it leaves
# is this one's.
LET_IN = (ROOM - 4) // 2 // 4
HEADER = "X-Request-Timeout-Seconds"


class Gate:
    """An application whose forwards wait while the gate is shut.

    Attributes:
        url: Where it is.
        handle: Its handle in this process.
    """

    def __init__(self, url: str, handle: Any, folder: Path) -> None:
        self.url = url
        self.handle = handle
        self._shut, self._ran = folder / "shut", folder / "ran"

    def shut(self) -> None:
        """Let a forward of this task hold the model's thread."""
        self._ran.unlink(missing_ok=True)
        self._shut.touch()

    def open(self) -> None:
        self._shut.unlink(missing_ok=True)

    def lengths(self) -> list[int]:
        """Tokens of every row that a forward was begun with since the gate was shut."""
        return [*map(int, self._ran.read_text().split())] if self._ran.exists() else []

    def wait_for(self, num_rows: int) -> None:
        until_s = time.monotonic() + 30
        while len(self.lengths()) < num_rows:
            assert time.monotonic() < until_s
            time.sleep(0.01)

    def ask(self, task: str, text: str, **headers: str) -> httpx2.Response:
        url = f"{self.url}/v1/tasks/{task}/predict"
        return httpx2.post(url, json={"text": text}, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def gated(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    from ray import serve

    import deployments.app
    from deployments.config import Args
    from deployments.model.deployment import Model

    folder = tmp_path_factory.mktemp("gate")

    class Gated(Model):
        async def __init__(self, args: Args) -> None:
            await Model.__init__(self, args)
            real = self.engine.predict

            def predict(rows: Any) -> Any:
                with (folder / "ran").open("a") as ran:
                    ran.writelines(f"{row.num_tokens}\n" for row in rows)
                while (folder / "shut").exists():
                    time.sleep(0.01)
                return real(rows)

            self.engine.predict = predict

    store = folder / "store"
    shutil.copytree(ROOT / "examples" / "store", store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deployments.app, "Model", Gated)
        application = deployments.app.build(
            Args(
                base_model=str(ROOT / "examples" / "base"),
                adapter_store=str(store),
                quantization="none",
                device="cpu",
                num_cpus=1,
                max_request_rows=ROOM // 2,
                max_request_tasks=ROOM // 8,
                max_rows_on_the_way=ROOM,
                default_task="spam",
            )
        )
    handle = serve.run(application, name="gated", route_prefix="/gated")
    yield Gate(f"{cluster}/gated", handle, folder)
    serve.delete("gated")


@pytest.fixture
def gate(gated: Gate) -> Iterator[Gate]:
    """The gate, shut, while a first row of `topic` is in the forward."""
    for task in ("spam", "topic", "sentiment"):
        assert gated.ask(task, "fine").status_code == 200
    gated.shut()
    with ThreadPoolExecutor(1) as callers:
        first = callers.submit(gated.ask, "topic", "the first")
        try:
            gated.wait_for(1)
            yield gated
        finally:
            gated.open()
            assert first.result().status_code == 200


def told(response: httpx2.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    return response.json()["detail"]


@pytest.mark.parametrize("path", ["/v1/tasks/spam/predict", "/predict"])
def test_after_its_deadline_a_request_is_answered_504_and_never_run(gate: Gate, path: str) -> None:
    started_s = time.monotonic()
    response = httpx2.post(
        gate.url + path, json={"text": "word " * 30}, headers={HEADER: "0.6"}, timeout=60
    )
    assert told(response, 504) == "the deadline passed before there was an answer"
    assert 0.5 < time.monotonic() - started_s < 3
    with ThreadPoolExecutor(1) as callers:
        later = callers.submit(gate.ask, "spam", "later", **{HEADER: "30"})
        gate.open()
        assert later.result().status_code == 200
    assert max(gate.lengths()) < 30


def test_of_many_tasks_those_without_an_answer_say_so(gate: Gate) -> None:
    body = {"tasks": ["spam", "nope", "sentiment"], "text": "word " * 30}
    response = httpx2.post(f"{gate.url}/v1/predict", json=body, headers={HEADER: "0.6"}, timeout=60)
    assert response.status_code == 200
    answers = response.json()["answers"]
    assert [answers[name]["status"] for name in body["tasks"]] == [504, 404, 504]
    assert "deadline passed" in answers["spam"]["error"]


def test_by_handle_a_deadline_is_a_timeout(gate: Gate) -> None:
    with pytest.raises(Exception, match="the deadline passed") as caught:
        gate.handle.predict.remote("spam", "late", timeout_s=0.6).result(timeout_s=30)
    assert type(getattr(caught.value, "cause", None)) is TimeoutError
    answer = gate.handle.predict_many.remote(["spam"], "late", timeout_s=0.6).result(timeout_s=30)
    assert answer["answers"]["spam"]["status"] == 504
    for wrong in (0, -1, "soon", float("nan"), True):
        with pytest.raises(Exception, match="is no number of seconds over 0") as caught:
            gate.handle.predict.remote("spam", "late", timeout_s=wrong).result(timeout_s=30)
        assert type(getattr(caught.value, "cause", None)) is ValueError


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", ""])
@pytest.mark.parametrize("path", ["/v1/tasks/spam/predict", "/predict", "/v1/predict"])
def test_a_deadline_that_is_none_is_refused_in_a_sentence(
    gated: Gate, path: str, value: str
) -> None:
    body = {"text": "fine", **({"tasks": ["spam"]} if path == "/v1/predict" else {})}
    response = httpx2.post(gated.url + path, json=body, headers={HEADER: value}, timeout=60)
    said = told(response, 422)
    assert said.startswith(f"{HEADER}: ")
    assert "\n" not in said


@pytest.mark.parametrize("path", ["/v1/tasks/spam/predict", "/v1/predict"])
def test_rows_of_a_caller_who_has_gone_are_never_run(gate: Gate, path: str) -> None:
    body = {"text": "word " * 40, **({"tasks": ["spam"]} if path == "/v1/predict" else {})}
    address = urlsplit(gate.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port or 0)
    headers = {"content-type": "application/json"}
    connection.request("POST", address.path + path, json.dumps(body), headers)
    time.sleep(0.5)  # it is on its way, or has not come that far: it must not run either way
    connection.close()
    time.sleep(0.5)
    gate.open()
    assert gate.ask("spam", "later").status_code == 200
    assert max(gate.lengths()) < 40


def test_beyond_the_room_requests_are_refused_at_once_and_another_task_is_not(gate: Gate) -> None:
    with ThreadPoolExecutor(ROOM) as callers:
        flood = [callers.submit(gate.ask, "spam", "many") for _ in range(ROOM)]
        until_s = time.monotonic() + 8
        while sum(one.done() for one in flood) < ROOM - LET_IN:
            assert time.monotonic() < until_s
            time.sleep(0.01)
        other = callers.submit(gate.ask, "sentiment", "another")
        refused = [one.result() for one in flood if one.done()]
        gate.open()
        answered = [one for one in flood if one.result().status_code == 200]
        assert other.result().status_code == 200
    assert len(answered) == LET_IN
    assert len(refused) == ROOM - LET_IN
    for response in refused:  # while the gate was shut
        assert "too many texts for 'spam' on their way" in told(response, 429)
        assert 1 <= int(response.headers["retry-after"]) <= 20
    assert gate.ask("spam", "again").status_code == 200
