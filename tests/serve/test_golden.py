"""golden.jsonl through a real model: a version's scores must be here what PEFT says they are."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TEXTS = ["I absolutely loved this product!", "The service was terrible."]


@pytest.fixture
def version(app: Any, ask: Any) -> Iterator[Path]:
    """The folder of a version of a task that no catalog has."""
    name = ask("sentiment", TEXTS)["version"]
    folder = app.store / "golden" / name
    shutil.copytree(app.store / "sentiment", folder)
    yield folder
    shutil.rmtree(folder.parent)


def misses(app: Any, version: Path, rules: dict[str, Any]) -> list[str]:
    found: list[str] = app.handle.try_golden.remote("golden", version.name, rules).result()
    return found


def test_scores_of_peft_hold_and_others_are_told(app: Any, version: Path, oracle: Any) -> None:
    assert misses(app, version, {}) == []  # there is no such file yet
    scores = oracle.scores(version, TEXTS)
    golden = [{"text": t, "scores": s} for t, s in zip(TEXTS, scores, strict=True)]
    golden.append({"text": TEXTS[0], "scores": {"Positive": scores[0][1] - 0.05}})
    (version / "golden.jsonl").write_text("\n".join(map(json.dumps, golden[:2])))
    assert misses(app, version, {}) == []
    (version / "golden.jsonl").write_text("\n".join(map(json.dumps, golden)))
    (miss,) = misses(app, version, {})
    assert "line 3" in miss
    assert "0.05 apart" in miss


def test_golden_lines_are_tried_under_the_rules_that_are_to_hold(
    app: Any, version: Path, oracle: Any
) -> None:
    long = "a fine film " * 20 + "but terrible, terrible, terrible"
    (cut,) = oracle.scores(version, [long], max_length=8)
    (version / "golden.jsonl").write_text(json.dumps({"text": long, "scores": cut}))
    assert misses(app, version, {"max_length": 8}) == []
    assert len(misses(app, version, {})) == 1
