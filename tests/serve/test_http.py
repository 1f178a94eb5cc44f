import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
TASKS = ("aspects", "sentiment", "spam", "topic")
SENTIMENT = "/v1/tasks/sentiment/predict"
TEXTS = ["I absolutely loved this product!", "The service was terrible."]


def ask(http: httpx2.Client, body: Any, path: str = SENTIMENT) -> dict[str, Any]:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def assert_problem(response: httpx2.Response, status: int, *words: str) -> None:
    """The response is problem details whose sentence has all of these words."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status
    assert problem["type"] == "about:blank"
    assert problem["title"]
    for word in words:
        assert word in problem["detail"], problem


def test_the_readme_call_answers_with_scores(http: httpx2.Client) -> None:
    answer = ask(http, {"texts": TEXTS, "return_scores": True})
    assert answer["task"] == "sentiment"
    assert len(answer["version"]) == 8
    assert set(answer["version"]) <= set("0123456789abcdef")
    assert answer["num_tokens"] > 2 * len(TEXTS)
    assert answer["timings_ms"]["model"] > 0
    assert [result["prediction"] for result in answer["results"]] == ["Positive", "Negative"]
    for result in answer["results"]:
        assert set(result) == {"prediction", "confidence", "probabilities"}
        probabilities = result["probabilities"]
        assert list(probabilities) == ["Negative", "Positive"]
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-6)
        assert result["prediction"] == max(probabilities, key=probabilities.get)
        assert result["confidence"] == max(probabilities.values())


def test_without_scores_a_result_is_its_prediction_alone(http: httpx2.Client) -> None:
    scored = ask(http, {"texts": TEXTS, "return_scores": True})["results"]
    plain = ask(http, {"texts": TEXTS})["results"]
    assert plain == [{"prediction": result["prediction"]} for result in scored]


def test_a_single_text_gives_one_result(http: httpx2.Client) -> None:
    assert ask(http, {"text": TEXTS[0]})["results"] == ask(http, {"texts": TEXTS[:1]})["results"]


def test_a_threshold_over_the_confidence_is_uncertain(http: httpx2.Client) -> None:
    (result,) = ask(http, {"text": TEXTS[0], "return_scores": True})["results"]
    confidence, label = result["confidence"], result["prediction"]
    under, over = confidence - 1e-3, min(confidence + 1e-3, 1.0)
    assert ask(http, {"text": TEXTS[0], "threshold": under})["results"] == [{"prediction": label}]
    (unsure,) = ask(http, {"text": TEXTS[0], "threshold": over, "return_scores": True})["results"]
    assert unsure["prediction"] == "Uncertain"
    assert unsure["confidence"] == pytest.approx(confidence, abs=1e-5)


def test_several_labels_can_hold_over_a_threshold(http: httpx2.Client) -> None:
    path = "/v1/tasks/aspects/predict"
    text = "The parcel came a week late, and support never answered."
    (result,) = ask(http, {"text": text, "return_scores": True}, path)["results"]
    probabilities = result["probabilities"]
    assert list(probabilities) == ["price", "quality", "delivery", "service"]
    assert "confidence" not in result
    assert result["prediction"] == [n for n, p in probabilities.items() if p >= 0.5]
    for threshold, labels in ((0.0, list(probabilities)), (1.0, [])):
        (result,) = ask(http, {"text": text, "threshold": threshold}, path)["results"]
        assert result == {"prediction": labels}


def test_the_guides_own_client_runs_unchanged(app: Any) -> None:
    # Its schema: {"texts": List[str], "return_scores": bool} in, {"results": List[dict]} out.
    answer = httpx2.post(f"{app.base_url}/predict", json={"texts": TEXTS}).json()
    assert {result["prediction"] for result in answer["results"]} <= {"Positive", "Negative"}
    answer = httpx2.post(
        f"{app.base_url}/predict", json={"texts": TEXTS, "return_scores": True}
    ).json()
    for result in answer["results"]:
        assert result["confidence"] == result["probabilities"][result["prediction"]]


def test_a_text_over_the_limit_is_cut_and_says_so(
    http: httpx2.Client, oracle: Any, app: Any
) -> None:
    long = "a good story, " * 200
    answer = ask(http, {"texts": [long, TEXTS[0]], "return_scores": True})
    cut, whole = answer["results"]
    assert cut["truncated"] is True
    assert "truncated" not in whole
    (expected,) = oracle.scores(app.store / "sentiment", [long])
    assert list(cut["probabilities"].values()) == pytest.approx(expected, abs=1e-4)


def test_the_listing_has_every_task_and_its_labels(http: httpx2.Client) -> None:
    tasks = {task["task"]: task for task in http.get("/v1/tasks").json()["tasks"]}
    assert {"aspects", "sentiment", "spam", "topic"} <= set(tasks)
    assert tasks["spam"]["labels"] == ["ham", "spam"]
    assert tasks["aspects"]["problem_type"] == "multi_label_classification"


def test_a_task_says_its_version_and_rules(http: httpx2.Client) -> None:
    said = http.get("/v1/tasks/sentiment").json()
    assert said["version"] == ask(http, {"texts": TEXTS})["version"]
    assert said["labels"] == ["Negative", "Positive"]
    assert said["problem_type"] == "single_label_classification"
    assert said["max_length"] == 128
    assert (said["method"], said["rank"], said["targets"]) == ("lora", 8, ["query", "value"])


def test_the_documentation_and_its_schema_are_served(http: httpx2.Client) -> None:
    docs = http.get("/docs")
    assert docs.status_code == 200
    assert "text/html" in docs.headers["content-type"]
    paths = http.get("/openapi.json").json()["paths"]
    assert {
        "/v1/tasks/{task}/predict", "/v1/tasks", "/v1/tasks/{task}", "/predict", "/v1/predict",
    } <= set(paths)  # fmt: skip


def test_a_hundred_mixed_requests_at_once_are_answered_as_peft_answers(
    http: httpx2.Client, oracle: Any, app: Any
) -> None:
    rng = random.Random(7)
    calls = []
    for task in TASKS:
        lines = (DATA / f"{task}.heldout.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in rng.sample(lines, 50)]
        calls += [(task, texts[index : index + 2]) for index in range(0, 50, 2)]
    rng.shuffle(calls)

    def send(call: tuple[str, list[str]]) -> dict[str, Any]:
        task, texts = call
        return ask(http, {"texts": texts, "return_scores": True}, f"/v1/tasks/{task}/predict")

    with ThreadPoolExecutor(len(calls)) as pool:
        answers = list(pool.map(send, calls))
    for task in TASKS:
        multi = task == "aspects"
        texts = [text for name, texts in calls if name == task for text in texts]
        results = [r for answer in answers if answer["task"] == task for r in answer["results"]]
        assert len(texts) == len(results) == 50
        scores = oracle.scores(app.store / task, texts, multi_label=multi)
        for expected, result in zip(scores, results, strict=True):
            labels = list(result["probabilities"])
            assert list(result["probabilities"].values()) == pytest.approx(expected, abs=1e-4)
            if multi:
                right = [n for n, p in zip(labels, expected, strict=True) if p >= 0.5]
            else:
                right = labels[expected.index(max(expected))]
            assert result["prediction"] == right


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"texts": []}, ["texts is empty", "give at least one text"]),
        ({"texts": ["fine", 3]}, ["texts[1]", "string"]),
        ({"texts": ["fine", None]}, ["texts[1]", "string"]),
        ({"texts": "one string"}, ["texts", "list"]),
        ({"texts": ["a"] * 1025}, ["1025 entries", "limit of 1024", "several requests"]),
        ({"texts": ["a"], "text": "b"}, ["either texts", "or text"]),
        ({}, ["either texts", "or text"]),
        ({"texts": None}, ["either texts", "or text"]),
        ({"text": 5}, ["text", "string"]),
        ({"texts": ["a"], "threshold": 2}, ["threshold", "less than or equal to 1"]),
        ({"texts": ["a"], "threshold": -0.1}, ["threshold", "greater than or equal to 0"]),
        ({"texts": ["a"], "threshold": "high"}, ["threshold", "number"]),
        ({"texts": ["a"], "return_scores": "yes"}, ["return_scores", "boolean"]),
        ({"texts": ["a"], "scores": True}, ["scores", "not a known field"]),
        ({"text": {"text": "a", "text_pair": "b"}}, ["texts[0]", "string", "sentiment"]),
        (["a"], ["JSON object"]),
        ("a", ["JSON object"]),
        (None, ["JSON object"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if not isinstance(value, list) else None,
)
@pytest.mark.parametrize("path", [SENTIMENT, "/predict"])
def test_a_bad_body_is_refused_with_what_to_change(
    http: httpx2.Client, path: str, body: Any, words: list[str]
) -> None:
    content = json.dumps(body)
    response = http.post(path, content=content, headers={"content-type": "application/json"})
    assert_problem(response, 422, *words)


@pytest.mark.parametrize("content", [b"{", b'{"texts": ["a"', b"\xff\xfe", b""])
def test_a_body_that_is_not_json_is_refused(http: httpx2.Client, content: bytes) -> None:
    response = http.post(SENTIMENT, content=content, headers={"content-type": "application/json"})
    assert_problem(response, 422, "body", "JSON")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_json_that_is_not_declared_as_such_is_told_to_be(http: httpx2.Client, kind: str) -> None:
    response = http.post(SENTIMENT, content='{"texts": ["a"]}', headers={"content-type": kind})
    assert_problem(response, 422, "content-type: application/json")


def test_an_unknown_task_says_where_to_look(http: httpx2.Client) -> None:
    response = http.post("/v1/tasks/nope/predict", json={"texts": ["a"]})
    assert_problem(response, 404, "no task 'nope'", "adapter store", "GET /v1/tasks")


def test_a_name_that_no_task_can_have_says_which_it_can(http: httpx2.Client) -> None:
    response = http.post("/v1/tasks/Not%20A%20Task/predict", json={"texts": ["a"]})
    assert_problem(response, 404, "'Not A Task' cannot be a task", "1 to 64 of a-z")


def test_a_description_of_an_unknown_task_says_where_to_look(http: httpx2.Client) -> None:
    assert_problem(http.get("/v1/tasks/nope"), 404, "no task 'nope'", "GET /v1/tasks")


# Of a bare ".." the client itself makes /v1/predict.
@pytest.mark.parametrize("name", ["%2e%2e", "..%2fstore", "sentiment%00", "a" * 65])
def test_a_name_that_could_be_a_path_is_no_task(http: httpx2.Client, name: str) -> None:
    response = http.post(f"/v1/tasks/{name}/predict", json={"texts": ["a"]})
    assert_problem(response, 404)


def chunks(num_bytes: int) -> Iterator[bytes]:
    yield b'{"texts": ["'
    for _ in range(num_bytes // 2**16):
        yield b"a " * 2**15
    yield b'"]}'


def test_a_body_over_the_limit_is_refused_by_its_declared_length(http: httpx2.Client) -> None:
    response = http.post(SENTIMENT, json={"texts": ["a" * 5 * 2**20]})
    assert_problem(response, 413, "4194304 bytes", "fewer texts", "max_body_bytes")


def test_a_chunked_body_over_the_limit_is_refused_too(http: httpx2.Client) -> None:
    response = http.post(
        SENTIMENT, content=chunks(5 * 2**20), headers={"content-type": "application/json"}
    )
    assert "content-length" not in response.request.headers
    assert_problem(response, 413, "4194304 bytes", "fewer texts", "max_body_bytes")


def test_a_chunked_body_under_the_limit_is_answered(http: httpx2.Client) -> None:
    response = http.post(
        SENTIMENT, content=chunks(2**18), headers={"content-type": "application/json"}
    )
    assert response.status_code == 200
    assert response.json()["results"][0]["truncated"] is True


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", SENTIMENT, 405, ["GET", "POST"]),
        ("PUT", "/v1/tasks/sentiment", 405, ["PUT", "GET"]),
        ("GET", "/v2/nothing", 404, ["/v2/nothing", "/docs"]),
    ],
)
def test_a_wrong_method_or_path_says_what_there_is(
    http: httpx2.Client, method: str, path: str, status: int, words: list[str]
) -> None:
    assert_problem(http.request(method, path), status, *words)


def test_a_wrong_method_is_told_the_allowed_ones_in_the_header_too(http: httpx2.Client) -> None:
    assert http.get(SENTIMENT).headers["allow"] == "POST"


def test_a_callers_mistakes_leave_no_traceback_in_the_log(
    http: httpx2.Client, short_dir: Path
) -> None:
    def tracebacks() -> int:
        logs = (short_dir / "ray" / "session_latest" / "logs" / "serve").glob("*_Ingress_*")
        return sum(log.read_text().count("Traceback") for log in logs)

    before = tracebacks()
    assert http.post("/v1/tasks/nope/predict", json={"texts": ["a"]}).status_code == 404
    assert http.post(SENTIMENT, json={"texts": []}).status_code == 422
    assert http.post(SENTIMENT, json={"texts": ["a" * 5 * 2**20]}).status_code == 413
    assert tracebacks() == before
