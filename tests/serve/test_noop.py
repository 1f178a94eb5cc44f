"""What the serving benchmark takes for an application without a forward, and without a hop."""

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

TEXTS = ["I absolutely loved this product!", "The parcel came late and nobody answered."]


@pytest.fixture(scope="module")
def noop(cluster: str, example_args: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Both applications; yields their URL and a handle to the model of each."""
    from ray import serve

    from benchmarks.noop import here, hop

    handles = {}
    for name, module in (("hop", hop), ("here", here)):
        serve.run(module.build(example_args), name=name, route_prefix=f"/{name}")
        handles[name] = serve.get_deployment_handle("Model", name)
    yield cluster, handles
    for name in handles:
        serve.delete(name)


def ask(url: str, **body: Any) -> dict[str, Any]:
    response = httpx2.post(url, json={"texts": TEXTS, "return_scores": True, **body}, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def test_both_answer_with_zeros_and_do_all_else(noop: tuple[str, dict[str, Any]]) -> None:
    url, _ = noop
    answers = [ask(f"{url}/{name}/v1/tasks/spam/predict") for name in ("hop", "here")]
    for answer in answers:
        assert answer.pop("timings_ms")["tokenize"] > 0
        for result in answer["results"]:
            assert result["probabilities"] == {"ham": 0.0, "spam": 0.0}
    assert answers[0] == answers[1]
    assert answers[0]["num_tokens"] > 2 * 8
    refused = httpx2.post(f"{url}/here/v1/tasks/spam/predict", json={"texts": []}, timeout=60)
    assert refused.status_code == 422


def test_only_one_of_them_reaches_its_model(noop: tuple[str, dict[str, Any]]) -> None:
    url, models = noop
    for name, num_rows in (("hop", len(TEXTS)), ("here", 0)):
        before = models[name].num_answered.remote().result(timeout_s=30)
        ask(f"{url}/{name}/v1/tasks/sentiment/predict")
        assert models[name].num_answered.remote().result(timeout_s=30) == before + num_rows
