"""What is told of the benchmarks is what was measured."""

import importlib
import json
import re
from pathlib import Path

import pytest

from benchmarks import QUESTIONS, question, record, report

ROOT = Path(__file__).parents[1]
ANSWERED = [name for name in QUESTIONS if record.read(name)]


def test_what_was_measured_belongs_to_a_question_and_says_its_setup() -> None:
    assert {path.stem for path in record.RESULTS.iterdir()} <= set(QUESTIONS)
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
    record.save(
        "mixing", [{"base": "b", "ms": {"k=1": 1.23456789, "all": [2 / 3]}, "rows": 1234567}]
    )
    (row,) = record.read("mixing")
    assert row["ms"] == {"k=1": 1.2346, "all": [0.66667]}
    assert (row["base"], row["rows"], row["question"]) == ("b", 1234567, "mixing")
    assert record.read("never-asked") == []
