"""Long texts that are read in several windows, through the Predictor."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from adapters.directory import Directory
from deployments.errors import BadInput
from deployments.ingress.calls import Answers, Encodings
from deployments.ingress.folders import Folders
from deployments.ingress.predict import Predictor
from deployments.ingress.tasks import Tasks
from deployments.ingress.windows import combine
from deployments.ingress.wire import PredictRequest
from deployments.room import Room
from deployments.rows import Facts
from deployments.tokens import Tokenizer

WORDS = ["fine", "bad", "vile", "bob", "[UNK]", "[CLS]", "[SEP]"]
FINE, BAD, VILE, BOB, UNK, CLS, SEP = range(len(WORDS))
LABELS = ["safe", "rude", "vile"]
MAX_ROWS = 50
Ask = Callable[..., Awaitable[list[dict[str, Any]]]]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    words = {word: index for index, word in enumerate(WORDS)}
    backend = Backend(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    return Tokenizer(
        {
            "backend": backend.to_str(),
            "max_length": 512,
            "truncation_side": "right",
            "split_special_tokens": False,
            "type_ids": True,
            "unk_id": UNK,
        }
    )


def scores(ids: list[int]) -> list[float]:
    """What a window says: surely safe, unless a bad word stands in it."""
    return (
        [0.02, 0.08, 0.9] if VILE in ids else [0.3, 0.6, 0.1] if BAD in ids else [0.98, 0.01, 0.01]
    )


class Model:
    """A guardrail; of tokens, one that knows Bob."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.asked: list[list[int]] = []

    async def describe(self, task: str) -> Facts:
        return self.facts

    async def ask(
        self, facts: Facts, inputs: Encodings, deadline_s: float | None = None
    ) -> Answers:
        self.asked += [ids for ids, _ in inputs]
        if facts["problem_type"] == "token_classification":
            return [[[0.1, 0.9] if i == BOB else [0.8, 0.2] for i in ids] for ids, _ in inputs]
        return ["broke" if UNK in ids else scores(ids) for ids, _ in inputs]


@pytest.fixture
def model(make_facts: Callable[..., Facts]) -> Model:
    return Model(
        make_facts(
            labels=LABELS, overflow="window", stride=2, window_scores="max", negative_label="safe"
        )
    )


@pytest.fixture
def ask(store: Directory, write: Callable[..., Path], model: Model, tokenizer: Tokenizer) -> Ask:
    write()
    tasks = Tasks(Folders(store, model.describe, settle_s=0), model.describe)
    predictor = Predictor(tasks, tokenizer, model.ask, Room(10**4), max_rows=MAX_ROWS)

    async def ask(*texts: Any, **others: Any) -> list[dict[str, Any]]:
        request = PredictRequest.model_validate({"texts": list(texts), **others})
        results: list[dict[str, Any]] = (await predictor.predict("mood", request))["results"]
        return results

    return ask


@pytest.mark.parametrize("place", [0, 13, 14, 99, 300, 510, 511])
async def test_harmless_tokens_walk_no_bad_word_past_a_guardrail(ask: Ask, place: int) -> None:
    words = ["fine"] * 512
    words[place] = "vile"
    texts = [" ".join(["fine"] * 512), " ".join(words), "vile"]
    harmless, bad, short = [(await ask(text, return_scores=True))[0] for text in texts]
    assert (harmless["prediction"], bad["prediction"]) == ("safe", "vile")
    assert bad["windows"] == harmless["windows"] == 43  # of 14 tokens, of which 2 are shared
    # The bad window's own softmax: the same numbers as of a short text.
    assert bad["probabilities"] == short["probabilities"]
    assert bad["confidence"] == 0.9
    assert set(short) == {"prediction", "confidence", "probabilities"}


async def test_a_threshold_is_of_the_window_that_was_taken(ask: Ask, model: Model) -> None:
    text = "fine " * 40 + "bad"
    (result,) = await ask(text)
    assert result == {"prediction": "rude", "windows": 4}
    assert (await ask(text, threshold=0.7))[0]["prediction"] == "Uncertain"
    model.facts["threshold"] = {"vile": 0.95}
    assert (await ask(text))[0]["prediction"] == "rude"
    assert (await ask("fine " * 40 + "vile"))[0]["prediction"] == "Uncertain"


async def test_a_text_that_fits_is_one_row_and_says_nothing_of_windows(
    ask: Ask, model: Model
) -> None:
    assert await ask("fine " * 14, "") == [{"prediction": "safe"}] * 2
    assert model.asked == [[CLS, *[FINE] * 14, SEP], [CLS, SEP]]
    model.asked.clear()
    assert (await ask("fine " * 15))[0]["windows"] == 2
    assert [len(ids) for ids in model.asked] == [16, 5]


async def test_windows_of_several_texts_stay_with_their_text(ask: Ask) -> None:
    texts = ["fine " * 30, "vile", "fine " * 20 + "vile", "", "bad " + "fine " * 40]
    said = await ask(*texts)
    assert [result["prediction"] for result in said] == ["safe", "vile", "vile", "safe", "rude"]
    assert [result.get("windows") for result in said] == [3, None, 2, None, 4]
    assert said == [(await ask(text))[0] for text in texts]


async def test_a_text_of_which_one_window_fails_fails_alone(ask: Ask) -> None:
    said = await ask("fine " * 40, "fine " * 20 + "odd", "vile")
    assert said[1] == {"error": "broke"}
    assert [result.get("prediction") for result in said] == ["safe", None, "vile"]


async def test_several_labels_and_values_have_their_own_maximum(ask: Ask, model: Model) -> None:
    model.facts |= {"problem_type": "multi_label_classification", "negative_label": None}
    text = "vile " + "fine " * 40 + "bad"
    (result,) = await ask(text, return_scores=True)
    assert result["probabilities"] == {"safe": 0.98, "rude": 0.6, "vile": 0.9}
    assert result["prediction"] == LABELS
    model.facts["problem_type"] = "regression"
    assert (await ask(text))[0]["prediction"] == [0.98, 0.6, 0.9]


async def test_the_mean_is_of_each_label_and_sums_to_1(ask: Ask, model: Model) -> None:
    model.facts |= {"window_scores": "mean", "negative_label": None}
    (result,) = await ask("vile " + "fine " * 25, return_scores=True)
    assert result["windows"] == 2
    assert result["probabilities"] == pytest.approx({"safe": 0.5, "rude": 0.045, "vile": 0.455})


def test_of_windows_that_are_equally_safe_the_first_is_taken(
    make_facts: Callable[..., Facts],
) -> None:
    facts = make_facts(labels=LABELS, window_scores="max", negative_label="safe")
    windows = [[0.5, 0.1, 0.4], [0.2, 0.7, 0.1], [0.2, 0.1, 0.7]]
    assert combine(facts, windows) == windows[1]
    assert combine(facts, windows[:1]) == windows[0]


async def test_of_a_pair_one_text_is_in_every_window(ask: Ask, model: Model) -> None:
    model.facts |= {"pair": True, "truncation": "only_first"}
    pair = {"text": "fine " * 30 + "vile", "text_pair": "bob bob"}
    (result,) = await ask(pair)
    assert result == {"prediction": "vile", "windows": 4}
    assert all(ids[-4:] == [SEP, BOB, BOB, SEP] for ids in model.asked)
    assert all(len(ids) <= 16 for ids in model.asked)
    model.facts["truncation"] = "only_second"
    (result,) = await ask({"text": pair["text_pair"], "text_pair": pair["text"]})
    assert result == {"prediction": "vile", "windows": 4}


async def test_a_pair_that_leaves_windows_no_room_fails_alone(ask: Ask, model: Model) -> None:
    model.facts |= {"pair": True, "truncation": "only_first"}
    fits = {"text": "fine " * 30, "text_pair": "fine"}
    full = {"text": "fine " * 30, "text_pair": "fine " * 11}
    said = await ask(fits, full, fits)
    assert [set(result) for result in said] == [
        {"prediction", "windows"}, {"error"}, {"prediction", "windows"},
    ]  # fmt: skip
    assert said[1]["error"] == (
        "cannot be read in windows of 16 tokens: beside what is in all of them there is room for "
        "2, which must be over the stride of 2"
    )


async def test_more_windows_than_the_limit_are_refused_before_the_model(
    ask: Ask, model: Model
) -> None:
    text = "fine " * (14 + 24 * 12)
    assert [result["windows"] for result in await ask(text, text)] == [25, 25]
    model.asked.clear()
    for texts in ([text, text, ""], ["fine " * 100_000], [text] * 10):
        with pytest.raises(BadInput, match="more than 50 windows of 16 tokens, the limit of a re"):
            await ask(*texts)
    assert model.asked == []


async def test_the_limit_holds_when_one_of_the_texts_cannot_be_read(ask: Ask, model: Model) -> None:
    model.facts |= {"pair": True, "truncation": "only_first"}
    long = {"text": "fine " * 250, "text_pair": ""}
    full = {"text": "fine " * 30, "text_pair": "fine " * 11}
    assert len(await ask(full, long, full)) == 3
    with pytest.raises(BadInput, match="more than 50 windows"):
        await ask(full, long, long, long)


async def test_entities_of_a_long_text_stand_where_they_stand_in_it(ask: Ask, model: Model) -> None:
    model.facts |= {
        "problem_type": "token_classification", "labels": ["O", "B-PER"], "aggregation": "simple",
        "window_scores": None, "negative_label": None,
    }  # fmt: skip
    words = ["fine"] * 60
    for place in (0, 12, 13, 31, 59):
        words[place] = "bob"
    text = " ".join(words)
    (result,) = await ask(text)
    assert result["windows"] == 5
    starts = [index for index in range(len(text)) if text.startswith("bob", index)]
    assert result["prediction"] == [
        {"label": "PER", "score": 0.9, "start": start, "end": start + 3, "text": "bob"}
        for start in starts
    ]
