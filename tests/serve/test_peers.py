"""What we are measured against starts, and answers as PEFT does: a broken peer is easily beaten."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from benchmarks.servers import free_port

ROOT = Path(__file__).resolve().parents[2]
BASE = str(ROOT / "examples" / "base")
SENTIMENT = ROOT / "examples" / "store" / "sentiment"
TEXTS = ["I absolutely loved this product!", "The parcel came late and nobody answered."]


@pytest.fixture(scope="module")
def guide() -> Iterator[str]:
    """The guide's server on a port of its own; yields its URL."""
    import uvicorn

    from benchmarks.peers.guide import load, make_app

    port = free_port()
    config = uvicorn.Config(make_app(*load(BASE, str(SENTIMENT))), port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_the_guides_server_answers_as_peft_does(guide: str, oracle: Any) -> None:
    body = {"texts": TEXTS, "return_scores": True}
    results = httpx2.post(f"{guide}/predict", json=body, timeout=30).json()["results"]
    want = oracle.scores(SENTIMENT, TEXTS)
    for result, (negative, positive) in zip(results, want, strict=True):
        assert result["prediction"] == ("Positive" if positive > negative else "Negative")
        assert result["probabilities"]["Positive"] == pytest.approx(positive, abs=1e-5)
    assert {result["prediction"] for result in results} == {"Positive", "Negative"}


def test_the_guides_server_names_only_the_label_unless_asked(guide: str) -> None:
    answer = httpx2.post(f"{guide}/predict", json={"texts": TEXTS}, timeout=30).json()
    assert answer == {"results": [{"prediction": "Positive"}, {"prediction": "Negative"}]}
    assert httpx2.post(f"{guide}/predict", json={"texts": "x"}, timeout=30).status_code == 422


@pytest.fixture(scope="module")
def idiom(cluster: str, make_adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Ray's idiom at /idiom with three adapters; yields its URL and their store."""
    from ray import serve

    from benchmarks.peers.ray_idiom import build

    store = tmp_path_factory.mktemp("idiom")
    for index in range(3):
        make_adapter(store / f"a{index}", seed=index)
    serve.run(build(BASE, str(store)), name="idiom", route_prefix="/idiom")
    yield f"{cluster}/idiom", store
    serve.delete("idiom")


def test_rays_idiom_answers_every_request_by_its_own_adapter(idiom: Any, oracle: Any) -> None:
    url, store = idiom
    asked = [(f"a{index % 3}", TEXTS[index % 2]) for index in range(24)]

    def ask(one: tuple[str, str]) -> list[float]:
        headers = {"serve_multiplexed_model_id": one[0]}
        response = httpx2.post(url, json={"text": one[1]}, headers=headers, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, asked))
    for (name, text), answer in zip(asked, answers, strict=True):
        ((want),) = oracle.scores(store / name, [text])
        assert answer == pytest.approx(want, abs=1e-4)


def test_a_merged_model_answers_as_its_adapter_does(oracle: Any) -> None:
    import torch
    from transformers import AutoTokenizer

    from benchmarks.peers.merged import answer_alone, merged_model

    given = AutoTokenizer.from_pretrained(BASE)(TEXTS, padding=True, return_tensors="pt")
    model = merged_model(BASE, str(SENTIMENT))
    assert not any("lora" in name for name, _ in model.named_modules())
    logits = answer_alone(model, given["input_ids"], given["attention_mask"])
    want = torch.tensor(oracle.scores(SENTIMENT, TEXTS))
    torch.testing.assert_close(logits.softmax(-1), want, atol=1e-5, rtol=0)
