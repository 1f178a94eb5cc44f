import io
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from adapters.directory import Directory
from adapters.errors import AdapterRefused, StagingTooLarge
from adapters.store import GOLDEN, MAX_GOLDEN_BYTES
from deployments.ingress import golden
from deployments.ingress.calls import Answers, Encodings
from deployments.ingress.golden import read_golden, try_golden
from deployments.ingress.runs import Runs
from deployments.rows import Facts
from deployments.tokens import Tokenizer

NUM_WORDS = 1000  # of the tokenizer of these tests


class Model:
    """Says by how high a text's highest word is, and what it was asked by."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.error: Exception | None = None

    async def ask(
        self, facts: Facts, inputs: Encodings, deadline_s: float | None = None
    ) -> Answers:
        version = facts["version"]
        self.asked.append((version, len(inputs)))
        if self.error is not None:
            raise self.error
        yes = [max(i for i in ids if i < NUM_WORDS) / NUM_WORDS for ids, _ in inputs]
        return ["this row broke" if one == 0.666 else [1 - one, one] for one in yes]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def runs(tokenizer: Tokenizer, model: Model) -> Runs:
    return Runs(tokenizer, model.ask, max_rows=100)


def lines(*given: dict[str, Any]) -> bytes:
    return "\n".join(json.dumps(line, allow_nan=True) for line in given).encode()


async def test_scores_that_hold_are_no_problem_in_either_form(
    runs: Runs, model: Model, make_facts: Callable[..., Facts]
) -> None:
    content = lines(
        {"text": "w900", "scores": {"yes": 0.9, "no": 0.1}},
        {"text": "w100", "scores": [0.9, 0.1]},
        {"text": "w200", "scores": {"yes": 0.2009}},
        {"text": "w300", "scores": [0.65, 0.35], "tolerance": 0.06},
    )
    assert await try_golden(content + b"\n\n", make_facts(version="aaaaaaaa"), runs) == []
    assert model.asked == [("aaaaaaaa", 4)]


async def test_a_miss_names_its_line_and_by_how_much(
    runs: Runs, make_facts: Callable[..., Facts]
) -> None:
    content = lines(
        {"text": "w900", "scores": {"yes": 0.9}},
        {"text": "w500", "scores": {"yes": 0.53, "no": 0.5}},
        {"text": "w200", "scores": {"yes": 0.2011}},
        {"text": "w666", "scores": {"yes": 0.666}},
    )
    content = content.replace(b"\n", b"\n\n", 1)  # a blank line counts as one
    assert await try_golden(content, make_facts(), runs) == [
        "golden.jsonl line 3: 'yes' is 0.5 here and 0.53 in the file, 0.03 apart, over the "
        "tolerance of 0.001",
        "golden.jsonl line 4: 'yes' is 0.2 here and 0.2011 in the file, 0.0011 apart, over the "
        "tolerance of 0.001",
        "golden.jsonl line 5: this row broke",
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"text": "w1", "scores": [0.1]}, "it has 1 scores, the task 2 labels"),
        ({"text": "w1", "scores": {"maybe": 0.1}}, "'maybe' is no label of the task"),
        ({"text": {"text": "w1", "text_pair": "w2"}, "scores": [0, 1]}, "must be a string"),
    ],
)
async def test_a_line_that_does_not_fit_the_task_is_named_alone(
    runs: Runs, make_facts: Callable[..., Facts], line: dict[str, Any], said: str
) -> None:
    good = {"text": "w900", "scores": {"yes": 0.9}}
    (problem,) = await try_golden(lines(good, line, good), make_facts(), runs)
    assert problem.startswith("golden.jsonl line 2: ")
    assert said in problem


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", '{"text": "w1"}', '{"scores": [1]}', '{"text": "w1", "scores": {}}',
        '{"text": "w1", "scores": []}', '{"text": "w1", "scores": [NaN]}',
        '{"text": "w1", "scores": [1], "tolerance": -1}', '{"text": 5, "scores": [1]}',
        '{"text": "w1", "scores": [1], "weight": 2}', "\udcff",
    ],
)  # fmt: skip
def test_a_bad_line_is_a_problem_and_ends_nothing(line: str) -> None:
    good = '{"text": "w1", "scores": [0.5]}'
    content = "\n".join((good, line, good)).encode("utf-8", "surrogateescape")
    read, problems = read_golden(content)
    assert [number for number, _ in read] == [1, 3]
    (problem,) = problems
    assert problem.startswith("golden.jsonl line 2: ")


async def test_a_file_without_lines_holds_nothing(
    runs: Runs, make_facts: Callable[..., Facts]
) -> None:
    assert await try_golden(b"\n \n", make_facts(), runs) == ["golden.jsonl has no line"]


async def test_pairs_and_many_lines_are_tried(
    runs: Runs, model: Model, make_facts: Callable[..., Facts]
) -> None:
    pair = {"text": {"text": "w1", "text_pair": "w800"}, "scores": {"yes": 0.8}}
    assert await try_golden(lines(*[pair] * 150), make_facts(pair=True), runs) == []
    assert [num for _, num in model.asked] == [64, 64, 22]


async def test_a_version_that_cannot_be_had_is_an_error_and_no_miss(
    runs: Runs, model: Model, make_facts: Callable[..., Facts]
) -> None:
    model.error = AdapterRefused("mood", ["no head"])
    with pytest.raises(AdapterRefused):
        await try_golden(lines({"text": "w1", "scores": [0, 1]}), make_facts(), runs)


async def test_token_classifiers_say_that_there_is_no_such_thing(
    runs: Runs, make_facts: Callable[..., Facts]
) -> None:
    facts = make_facts(problem_type="token_classification", aggregation="none")
    (problem,) = await try_golden(lines({"text": "w1", "scores": [0, 1]}), facts, runs)
    assert "token classifier" in problem


async def test_after_64_problems_no_line_is_run_any_more(
    runs: Runs, model: Model, make_facts: Callable[..., Facts]
) -> None:
    good, miss = ({"text": "w500", "scores": {"yes": yes}} for yes in (0.5, 0.7))
    problems = await try_golden(lines(*[good] * 64, *[miss] * 150), make_facts(), runs)
    assert [num for _, num in model.asked] == [64, 64]
    assert len(problems) == 65
    assert problems[-1] == "the last 86 lines of golden.jsonl were not tried"


async def test_of_many_lines_that_are_none_few_are_told(
    runs: Runs, model: Model, make_facts: Callable[..., Facts]
) -> None:
    problems = await try_golden(b"{\n" * 10_000, make_facts(), runs)
    assert problems[-1] == "and 9936 more"
    assert len(problems) == 65
    (problem,) = await try_golden(b"{}\n" * 10_001, make_facts(), runs)
    assert problem == "golden.jsonl has 10001 lines, over the limit of 10000"
    assert model.asked == []


async def test_lines_are_read_beside_the_event_loop(
    runs: Runs, make_facts: Callable[..., Facts], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def read(content: bytes) -> Any:
        threads.append(threading.current_thread())
        return read_golden(content)

    monkeypatch.setattr(golden, "read_golden", read)
    await try_golden(lines({"text": "w900", "scores": {"yes": 0.9}}), make_facts(), runs)
    assert threads[0] is not threading.main_thread()


def test_what_is_taken_in_is_what_can_be_read(store: Directory) -> None:
    content = b" " * MAX_GOLDEN_BYTES
    store.discard(store.stage({GOLDEN: io.BytesIO(content)}))
    with pytest.raises(StagingTooLarge, match=GOLDEN):
        store.stage({GOLDEN: io.BytesIO(content + b" ")})
