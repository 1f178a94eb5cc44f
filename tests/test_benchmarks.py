"""What is told of the benchmarks is what was measured."""

import importlib
import json
import re
from itertools import chain
from pathlib import Path

import pytest

from benchmarks import QUESTIONS, guide, padding, question, record, report
from benchmarks.examples import (
    BASE,
    STORE,
    STORE_FOLDER,
    example_engine,
    example_planner,
    example_rows,
    example_texts,
    example_tokenizer,
)
from benchmarks.peers.guide import load, predict_sentiment
from deployments.model.engine import Engine

ROOT = Path(__file__).parents[1]
ANSWERED = [name for name in QUESTIONS if record.read(name)]


def test_what_was_measured_belongs_to_a_question_and_says_its_setup() -> None:
    assert {path.stem for path in record.RESULTS.iterdir()} <= {*QUESTIONS, "gpu"}
    for name in ANSWERED:
        for row in record.read(name):
            assert row["question"] == name
            assert {"date", "commit", "cpu", "cores", "threads", "torch"} <= set(row["setup"])


@pytest.mark.parametrize("name", ANSWERED)
def test_a_table_is_what_its_module_makes_of_the_results(name: str) -> None:
    text = (record.RESULTS / f"{name}.md").read_text()
    assert text == question(name).as_table(record.read(name)) + "\n"


def test_readme_and_docs_say_what_the_results_say() -> None:
    readme = (ROOT / "README.md").read_text()
    (said,) = re.findall(r"<!-- speed -->(.*?)<!-- /speed -->", readme, flags=re.DOTALL)
    assert said == report.sentences()
    assert (ROOT / "docs" / "benchmarks.md").read_text() == report.document()
    for path in re.findall(r"\]\(\.\./(.*?)\)", report.document()):
        assert (ROOT / path).is_file()


def test_another_number_in_the_results_is_another_number_in_the_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = record.read("mixing")
    before = report.document(), report.sentences()
    for row in rows:
        row["of_plain"]["k=32"] = 0.123
    (tmp_path / "mixing.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert "| 0.12 |" in report.document()
    assert "0.12 to 0.12" in report.sentences()
    assert (report.document(), report.sentences()) != before


@pytest.mark.parametrize("name", ANSWERED)
def test_a_plot_is_the_same_whenever_it_is_drawn(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with `make bench`")
    plot = importlib.import_module("benchmarks.plot")
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    first = plot.save_plot(name, record.read(name)).read_bytes()
    assert plot.save_plot(name, record.read(name)).read_bytes() == first
    assert len(first) < 100_000
    assert (record.RESULTS / f"{name}.svg").is_file()


def test_numbers_are_saved_with_five_digits_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    row = {"base": "b", "ms": {"k=1": 1.23456789, "all": [2 / 3]}, "rows": 1234567}
    record.save("mixing", [row], {"cores": 2})
    (row,) = record.read("mixing")
    assert row["ms"] == {"k=1": 1.2346, "all": [0.66667]}
    assert (row["base"], row["rows"], row["question"]) == ("b", 1234567, "mixing")
    assert row["setup"] == {"cores": 2}
    assert record.read("never-asked") == []


@pytest.fixture(scope="module")
def engine() -> Engine:
    return example_engine("none")


def test_both_sides_of_the_guides_table_give_the_same_labels(engine: Engine) -> None:
    slot = 1 + STORE.tasks().index(guide.TASK)
    texts = [text for task, text in example_texts() if task == slot][:24]
    model, tokenizer = load(BASE, f"{STORE_FOLDER}/{guide.TASK}")
    want = predict_sentiment(texts, model, tokenizer)
    planner = example_planner()
    ours = guide.answer(engine, example_tokenizer(engine), planner, slot, texts)
    assert ours == want
    assert set(want) == set(guide.LABELS)


def test_a_planned_queue_answers_every_row_once(engine: Engine) -> None:
    rows = example_rows(example_tokenizer(engine))[:96]
    for depth in (96, 20):
        batches = padding.run_planned(engine, rows, depth)
        assert sorted(map(id, chain.from_iterable(batches))) == sorted(map(id, rows))
        assert batches[0][0] is rows[0]
        assert all(len(batch) <= depth for batch in batches)
    noted: dict[str, float] = {}
    padding.note(noted, "planned", lambda: padding.run_planned(engine, rows, 96))
    padding.note(noted, padding.WAYS[0], lambda: padding.in_order(rows))
    assert 1 == noted["planned"] < noted[padding.WAYS[0]]


def test_equal_rows_have_as_many_tokens(engine: Engine) -> None:
    rows = example_rows(example_tokenizer(engine))[:512]
    even = list(chain.from_iterable(padding.equal(rows)))
    assert len({row.num_tokens for row in even}) == 1
    real = sum(row.num_tokens for row in rows)
    assert sum(row.num_tokens for row in even) == pytest.approx(real, rel=0.01)
