import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from adapters.directory import Directory
from adapters.errors import AdapterChanged, AdapterRefused
from deployments.errors import BadInput
from deployments.ingress import runs
from deployments.ingress.calls import Answers, Encodings
from deployments.ingress.folders import Folders
from deployments.ingress.predict import Predictor
from deployments.ingress.tasks import Tasks
from deployments.ingress.wire import PredictRequest
from deployments.room import Room
from deployments.rows import Facts
from deployments.tokens import Tokenizer

NUM_WORDS = 1000  # of the tokenizer of these tests
CLS, SEP = NUM_WORDS + 1, NUM_WORDS + 2


def score(ids: list[int]) -> float:
    """A number that spells the row."""
    return sum(token * 1009**place for place, token in enumerate(ids)) % 1_000_003 / 1_000_003


def share(token: int) -> float:
    """A token's score of the first label."""
    return token / NUM_WORDS


@dataclass
class Model:
    """Scores a row by what it says; `broken` words fail their row alone."""

    facts: Facts
    calls: list[tuple[Facts, Encodings]] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    broken: set[int] = field(default_factory=set)
    num_described: int = 0

    async def describe(self, task: str) -> Facts:
        self.num_described += 1
        return {**self.facts, "version": f"{self.num_described:08}"}

    async def ask(
        self, facts: Facts, inputs: Encodings, deadline_s: float | None = None
    ) -> Answers:
        self.calls.append((facts, inputs))
        await asyncio.sleep(0.02 / len(self.calls))  # later calls end earlier
        if self.errors:
            raise self.errors.pop(0)
        if facts["problem_type"] == "token_classification":
            return [[[share(i), 1 - share(i)] for i in ids] for ids, _ in inputs]
        return [
            "this row broke" if self.broken & set(ids) else [score(ids), 1 - score(ids)]
            for ids, _ in inputs
        ]


@pytest.fixture
def model(make_facts: Callable[..., Facts]) -> Model:
    return Model(make_facts())


Ask = Callable[..., Any]


@pytest.fixture
def ask(store: Directory, write: Callable[..., Path], model: Model, tokenizer: Tokenizer) -> Ask:
    write()
    tasks = Tasks(Folders(store, model.describe, settle_s=0), model.describe)
    predictor = Predictor(tasks, tokenizer, model.ask, Room(10**4), max_rows=2000)

    async def ask(*texts: Any, task: str = "mood", **others: Any) -> dict[str, Any]:
        request = PredictRequest.model_validate({"texts": list(texts), **others})
        return await predictor.predict(task, request)

    return ask


def ids_of(text: str) -> list[int]:
    return [CLS, *(int(word[1:]) for word in text.split()), SEP]


async def test_every_row_has_its_own_answer_in_order(ask: Ask, model: Model) -> None:
    texts = [f"w{n} w{n * 7 % NUM_WORDS}" for n in range(NUM_WORDS)]
    answer = await ask(*texts, return_scores=True)
    assert answer["task"] == "mood"
    assert answer["version"] == "00000001"
    assert answer["num_tokens"] == 4 * NUM_WORDS
    assert set(answer["timings_ms"]) == {"tokenize", "model"}
    for text, result in zip(texts, answer["results"], strict=True):
        own = score(ids_of(text))
        assert result["probabilities"] == {"no": own, "yes": 1 - own}
        assert result["prediction"] == ("no" if own >= 0.5 else "yes")
        assert result["confidence"] == max(own, 1 - own)
    ((facts, inputs),) = model.calls
    assert (facts["task"], facts["version"]) == ("mood", "00000001")
    assert inputs == [(ids_of(text), None) for text in texts]


async def test_a_row_that_fails_in_the_model_fails_alone(ask: Ask, model: Model) -> None:
    model.broken = {5}
    answer = await ask("w4", "w5", "w6")
    assert answer["results"][1] == {"error": "this row broke"}
    assert [set(result) for result in answer["results"]] == [
        {"prediction"},
        {"error"},
        {"prediction"},
    ]


async def test_a_long_text_is_cut_and_says_so(ask: Ask, model: Model) -> None:
    answer = await ask("w1 " * 30, "w2", "w3 " * 14, "w4 " * 15)
    assert [result.get("truncated") for result in answer["results"]] == [True, None, None, True]
    assert [len(ids) for ids, _ in model.calls[0][1]] == [16, 3, 16, 16]
    assert answer["num_tokens"] == 51


async def test_a_long_text_that_may_not_be_cut_fails_alone(ask: Ask, model: Model) -> None:
    model.facts["truncation"] = None
    answer = await ask("w1", "w2 " * 30, "w3", return_scores=True)
    assert "32 tokens are over the task's max_length of 16" in answer["results"][1]["error"]
    for place, text in ((0, "w1"), (2, "w3")):
        assert answer["results"][place]["probabilities"]["no"] == score(ids_of(text))
    assert len(model.calls[0][1]) == 2


async def test_a_text_that_cannot_be_cut_as_the_rules_say_fails_alone(
    ask: Ask, model: Model
) -> None:
    model.facts |= {"truncation": "only_second", "pair": True}
    good, bad = {"text": "w1", "text_pair": "w2 " * 30}, {"text": "w1 " * 30, "text_pair": "w2"}
    answer = await ask(good, bad, good)
    assert "cannot be cut to 16 tokens" in answer["results"][1]["error"]
    assert [set(result) for result in answer["results"]] == [
        {"prediction", "truncated"}, {"error"}, {"prediction", "truncated"},
    ]  # fmt: skip


async def test_with_no_row_left_the_model_is_not_asked(ask: Ask, model: Model) -> None:
    model.facts["truncation"] = None
    answer = await ask("w2 " * 30)
    assert set(answer["results"][0]) == {"error"}
    assert model.calls == []
    assert answer["num_tokens"] == 0


async def test_a_version_that_changed_on_the_way_is_asked_for_anew(ask: Ask, model: Model) -> None:
    changed = AdapterChanged("mood", "00000001", "00000002")
    model.errors = [RayTaskError("predict", "trace", changed).as_instanceof_cause()]
    answer = await ask("w1", return_scores=True)
    assert answer["version"] == "00000002"
    assert [facts["version"] for facts, _ in model.calls] == ["00000001", "00000002"]
    assert answer["results"][0]["probabilities"]["no"] == score(ids_of("w1"))


async def test_a_version_that_keeps_changing_is_given_up(ask: Ask, model: Model) -> None:
    model.errors = [AdapterChanged("mood", "1", "2"), AdapterChanged("mood", "2", "3")]
    with pytest.raises(AdapterChanged, match="2 to 3"):
        await ask("w1")
    assert len(model.calls) == 2


async def test_another_error_of_the_model_is_not_repeated(ask: Ask, model: Model) -> None:
    model.errors = [AdapterRefused("mood", ["no head"])]
    with pytest.raises(AdapterRefused):
        await ask("w1")
    assert len(model.calls) == 1


@pytest.mark.parametrize(("own", "asked"), [(1.0, None), (None, 1.0), (0.0, 1.0)])
async def test_thresholds_of_task_and_request_reach_the_answer(
    ask: Ask, model: Model, own: float | None, asked: float | None
) -> None:
    model.facts["threshold"] = own
    answer = await ask("w1", threshold=asked)
    assert answer["results"] == [{"prediction": "Uncertain"}]


async def test_a_regression_gives_values_and_takes_no_threshold(ask: Ask, model: Model) -> None:
    model.facts |= {"problem_type": "regression", "labels": ["x", "y"]}
    own = score(ids_of("w1"))
    assert (await ask("w1"))["results"] == [{"prediction": [own, 1 - own]}]
    assert model.calls[0][0]["problem_type"] == "regression"
    with pytest.raises(BadInput, match="is a regression and takes no threshold"):
        await ask("w1", threshold=0.5)


@pytest.fixture
def of_tokens(model: Model) -> None:
    """Make the task a token classifier, of which the lower words are names."""
    model.facts |= {
        "problem_type": "token_classification", "labels": ["O", "B-NAME"], "aggregation": "none",
    }  # fmt: skip


@pytest.mark.usefixtures("of_tokens")
async def test_entities_have_their_place_in_the_caller_s_text(ask: Ask, model: Model) -> None:
    answer = await ask("w900  👍 w100\ud800 w250", "", "w999", return_scores=True)
    assert model.calls[0][0]["problem_type"] == "token_classification"
    assert answer["results"] == [
        {
            "prediction": [
                {"label": "B-NAME", "score": 0.9, "start": 8, "end": 12, "text": "w100"},
                {"label": "B-NAME", "score": 0.75, "start": 14, "end": 18, "text": "w250"},
            ],
            "replaced_characters": 1,
        },
        {"prediction": []},
        {"prediction": []},
    ]


@pytest.mark.usefixtures("of_tokens")
@pytest.mark.parametrize(
    ("own", "asked", "found"),
    [
        (None, None, ["w100", "w250"]), (0.75, None, ["w100", "w250"]), (0.8, None, ["w100"]),
        (0.8, 0.1, ["w100", "w250"]), (None, 0.95, []), ({"B-NAME": 0.8}, None, ["w100"]),
        ({"O": 0.99}, None, ["w100", "w250"]), ({"B-NAME": 0.8}, 0.5, ["w100", "w250"]),
    ],
)  # fmt: skip
async def test_entities_under_their_threshold_are_left_out(
    ask: Ask, model: Model, own: Any, asked: float | None, found: list[str]
) -> None:
    model.facts["threshold"] = own
    (result,) = (await ask("w900 w100 w250", threshold=asked))["results"]
    assert [entity["text"] for entity in result["prediction"]] == found


@pytest.mark.usefixtures("of_tokens")
async def test_a_long_text_s_entities_are_those_of_what_was_read(ask: Ask) -> None:
    (result,) = (await ask("w900 " * 13 + "w100 w200"))["results"]
    assert [entity["text"] for entity in result["prediction"]] == ["w100"]
    assert result["truncated"]


async def test_pairs_reach_the_model_as_one_input_with_segments(ask: Ask, model: Model) -> None:
    model.facts["pair"] = True
    await ask({"text": "w1 w2", "text_pair": "w3"}, {"text": "w4", "text_pair": ""})
    assert model.calls[0][1] == [
        ([CLS, 1, 2, SEP, 3, SEP], [0, 0, 0, 0, 1, 1]),
        ([CLS, 4, SEP, SEP], [0, 0, 0, 1]),
    ]


PAIR = {"text": "w1", "text_pair": "w2"}


@pytest.mark.parametrize(
    ("texts", "changes", "said"),
    [
        ([], {}, "texts is empty"),
        (["w1"] * 2001, {}, "2001 entries, over the limit of 2000"),
        (["w1", PAIR], {}, "texts[1] must be a string"),
        ([PAIR, "w1"], {"pair": True}, 'texts[1] must be {"text": …, "text_pair": …}'),
    ],
)
async def test_input_that_does_not_fit_the_task_is_refused_before_the_model(
    ask: Ask, model: Model, texts: list[Any], changes: dict[str, Any], said: str
) -> None:
    model.facts |= changes
    with pytest.raises(BadInput) as caught:
        await ask(*texts)
    assert said in str(caught.value)
    assert model.calls == []


@pytest.mark.parametrize(
    ("text", "pair", "ids", "replaced"),
    [
        ("w1 \ud800 w2", None, [CLS, 1, NUM_WORDS, 2, SEP], 1),
        ("\udc00\ud83d", None, [CLS, NUM_WORDS, SEP], 2),
        ("w1 \ufffd \U0001f44d", None, [CLS, 1, NUM_WORDS, NUM_WORDS, SEP], None),
        ("w1 \ud800", "\udfff w2", [CLS, 1, NUM_WORDS, SEP, NUM_WORDS, 2, SEP], 2),
    ],
)
async def test_half_a_surrogate_pair_is_replaced_and_the_result_says_so(
    ask: Ask, model: Model, text: str, pair: str | None, ids: list[int], replaced: int | None
) -> None:
    model.facts["pair"] = pair is not None
    (result,) = (await ask(text if pair is None else {"text": text, "text_pair": pair}))["results"]
    assert result.pop("replaced_characters", None) == replaced
    assert set(result) == {"prediction"}
    assert model.calls[0][1][0][0] == ids


async def test_as_many_texts_as_the_limit_are_answered(ask: Ask) -> None:
    assert len((await ask(*["w1"] * 2000))["results"]) == 2000


async def test_encoding_does_not_hold_up_the_event_loop(
    ask: Ask, model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, begun, encode = 0, asyncio.Event(), tokenizer.encode
    loop = asyncio.get_running_loop()

    def slow(*arguments: Any, **named: Any) -> Any:
        loop.call_soon_threadsafe(begun.set)
        # Goes on once the loop has turned, which it could not if it waited here.
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), loop).result(5)
        return encode(*arguments, **named)

    monkeypatch.setattr(tokenizer, "encode", slow)
    call = asyncio.ensure_future(ask("w1 " * (runs._SHORT_CHARACTERS // 3 + 1)))
    await asyncio.wait_for(begun.wait(), 5)
    while not call.done():
        turns += 1
        await asyncio.sleep(0.001)
    assert turns > 3
    assert len((await call)["results"]) == 1
