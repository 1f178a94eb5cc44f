"""Every kind of input and of problem over HTTP, with PEFT and transformers as the oracles."""

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

BASE = Path(__file__).resolve().parents[2] / "examples" / "base"
HARMLESS = (
    "You left your scarf in the cinema, row K. The man at the counter is keeping it for you. "
)
SPAM = (
    "Pay your driving fine of 45 today with 50% reduction or face court. fine-office.example.com",
    "Typists needed!! Type 10 pages a day and make 700, registration only 25, results same evening",
)
PAIRS = [
    ("A man is asleep.", "Nobody is awake."), ("It rains.", "The street is wet."), ("", ""),
    ("only the first", ""), ("word " * 200, "It is long."), ("👍 שלום", "a\0b"),
]  # fmt: skip
TAGS = ["O", "B-PER", "I-PER", "B-LOC"]
NAMES = [
    "My name is Sarah and I live in London.", "Jean-Baptiste Übergrößen à Montréal 👩‍👩‍👧 東京都",
    "", "tokenization of untokenizable re-tokenising", "שלום עולם to the right",
]  # fmt: skip


def write_rules(folder: Path, **changes: Any) -> None:
    path = folder / "task.json"
    rules = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**rules, **changes}))


def make_tagger(folder: Path) -> Any:
    """Write a random token classifier, and return transformers' pipeline of it."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import (
        AutoModelForTokenClassification,
        AutoTokenizer,
        TokenClassificationPipeline,
    )

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: Any = AutoModelForTokenClassification.from_pretrained(
            BASE, id2label=dict(enumerate(TAGS)), label2id={tag: n for n, tag in enumerate(TAGS)}
        )
        model = get_peft_model(
            model, LoraConfig(task_type=TaskType.TOKEN_CLS, r=4, target_modules=["query", "value"])
        )
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3 if "classifier" in name else 0.05)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    return TokenClassificationPipeline(
        model=model.merge_and_unload().eval(), tokenizer=tokenizer, aggregation_strategy="first"
    )


@pytest.fixture(scope="module")
def tagger(app: Any, make_adapter: Any, tmp_path_factory: Any) -> Iterator[Any]:
    """Puts four tasks into the store: guard, nli, names and wide; yields names' oracle."""
    made = tmp_path_factory.mktemp("inputs")
    shutil.copytree(app.store / "spam", made / "guard")
    write_rules(made / "guard", max_length=32, overflow="window", negative_label="ham", stride=8)
    make_adapter(made / "nli", labels=3, seed=1)
    write_rules(made / "nli", pair=True, max_length=64, labels=["yes", "no", "maybe"])
    make_adapter(made / "wide", labels=2, seed=2)
    pipeline = make_tagger(made / "names")
    write_rules(made / "names", labels=TAGS, aggregation="first")
    tasks = [folder.name for folder in made.iterdir()]
    for task in tasks:
        shutil.copytree(made / task, app.store / task)
    yield pipeline
    for task in tasks:
        shutil.rmtree(app.store / task)


pytestmark = pytest.mark.usefixtures("tagger")


@pytest.mark.parametrize("spam", SPAM)
def test_512_harmless_tokens_walk_no_bad_text_past_a_guardrail(
    ask: Any, app: Any, oracle: Any, spam: str
) -> None:
    harmless = HARMLESS * 25
    text = f"{harmless}{spam} {HARMLESS}"
    cut = ask("spam", [text])
    assert cut["num_tokens"] == 128
    assert (cut["results"][0]["prediction"], cut["results"][0]["truncated"]) == ("ham", True)
    short, found = ask("guard", [harmless, text])["results"]
    assert (short["prediction"], found["prediction"]) == ("ham", "spam")
    scores = oracle.scores(app.store / "guard", [text], max_length=32, stride=8)
    assert found["windows"] == len(scores) > 512 // 32
    assert list(found["probabilities"].values()) == pytest.approx(min(scores), abs=1e-4)


def test_a_hundred_thousand_characters_are_answered_and_hold_nobody_up(
    http: httpx2.Client, ask: Any
) -> None:
    texts = ["x" * 100_000, "👍" * 100_000, "a b " * 25_000, "\0" * 100_000, "مرحبا " * 17_000]
    with ThreadPoolExecutor(6) as pool:
        long = [pool.submit(ask, "spam", [text]) for text in texts]
        started_s = time.monotonic()
        assert (
            ask("sentiment", ["I absolutely loved this product!"])["results"][0]["prediction"]
            == "Positive"
        )
        assert time.monotonic() - started_s < 10
        for future in long:
            (result,) = future.result()["results"]
            assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    (result,) = ask("guard", ["x " * 300])["results"]
    assert result["windows"] == 14  # of 30 tokens, of which 8 are shared
    body = {"texts": ["a b " * 25_000]}
    response = http.post("/v1/tasks/guard/predict", json=body)
    assert response.status_code == 422
    assert "more than 1024 windows of 32 tokens" in response.json()["detail"]


def test_lone_surrogates_are_replaced_and_the_result_says_so(http: httpx2.Client) -> None:
    content = (
        r'{"texts": ["half \ud83d a pair", "a whole \ud83d\ude00 one"], "return_scores": true}'
    )
    for task in ("spam", "guard"):
        response = http.post(
            f"/v1/tasks/{task}/predict",
            content=content,
            headers={"content-type": "application/json"},
        )
        assert response.status_code == 200, response.text
        half, whole = response.json()["results"]
        assert half["replaced_characters"] == 1
        assert "replaced_characters" not in whole
        body = {"text": "half \ufffd a pair", "return_scores": True}
        (same,) = http.post(f"/v1/tasks/{task}/predict", json=body).json()["results"]
        assert half["probabilities"] == pytest.approx(same["probabilities"], abs=1e-5)


def test_rows_of_512_tokens_and_of_3_are_answered_as_alone(ask: Any, app: Any, oracle: Any) -> None:
    odd = ["", "hi", "a\0b", "\u202eright\u202c to left שלום", "👩‍👩‍👧 🇩🇪", "[SEP] [CLS]"]
    texts = [*odd, "word " * 600, *odd, "one two three " * 200]
    answer = ask("wide", texts)
    expected = oracle.scores(app.store / "wide", texts, max_length=512)
    for result, scores in zip(answer["results"], expected, strict=True):
        assert list(result["probabilities"].values()) == pytest.approx(scores, abs=1e-4)
    assert [result.get("truncated") for result in answer["results"]].count(True) == 2
    assert answer["num_tokens"] > 2 * 512


def test_pairs_are_answered_as_peft_answers(
    http: httpx2.Client, app: Any, oracle: Any, assert_problem: Any
) -> None:
    texts = [{"text": text, "text_pair": pair} for text, pair in PAIRS]
    response = http.post("/v1/tasks/nli/predict", json={"texts": texts, "return_scores": True})
    assert response.status_code == 200, response.text
    expected = oracle.scores(app.store / "nli", PAIRS, max_length=64)
    for result, scores in zip(response.json()["results"], expected, strict=True):
        assert list(result["probabilities"].values()) == pytest.approx(scores, abs=1e-4)
    one = http.post("/v1/tasks/nli/predict", json={"text": texts[0]}).json()["results"]
    assert one == [{"prediction": response.json()["results"][0]["prediction"]}]
    alone = http.post("/v1/tasks/nli/predict", json={"texts": [texts[0], "alone"]})
    assert_problem(alone, 422, "texts[1]", "text_pair")


def test_entities_are_those_of_the_pipeline(http: httpx2.Client, tagger: Any) -> None:
    response = http.post("/v1/tasks/names/predict", json={"texts": NAMES})
    assert response.status_code == 200, response.text
    for text, result in zip(NAMES, response.json()["results"], strict=True):
        expected = tagger(text) if text else []
        found = result["prediction"]
        assert [(e["label"], e["start"], e["end"]) for e in found] == [
            (e["entity_group"], e["start"], e["end"]) for e in expected
        ]
        assert [e["score"] for e in found] == pytest.approx(
            [float(e["score"]) for e in expected], abs=1e-4
        )
        assert [e["text"] for e in found] == [text[e["start"] : e["end"]] for e in found]
    said = http.get("/v1/tasks/names").json()
    assert (said["problem_type"], said["aggregation"]) == ("token_classification", "first")
    assert said["guessed"] == ["max_length"]


def test_what_was_guessed_and_what_becomes_of_long_texts_is_said(http: httpx2.Client) -> None:
    wide, guard = (http.get(f"/v1/tasks/{task}").json() for task in ("wide", "guard"))
    assert wide["guessed"] == ["labels", "problem_type", "max_length"]
    assert (wide["overflow"], wide["stride"]) == ("truncate", None)
    assert (guard["overflow"], guard["stride"], guard["window_scores"]) == ("window", 8, "max")
