"""What README.md says is so."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from adapters.directory import Directory
from deployments.model.engine import Engine
from deployments.model.vocabulary import export_vocabulary
from deployments.rows import Prediction, Row
from deployments.tokens import Tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "docs" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_accuracy_table_is_what_the_script_writes(writer: ModuleType) -> None:
    assert "| `sentiment` |" in README
    assert writer.fill(README, "accuracy", writer.accuracy_table()) == README


def test_every_folder_and_file_of_the_tree_exists() -> None:
    tree = README.split("## Where things are")[1].split("The engine needs")[0]
    names = re.findall(r"^    ([a-z]+/)|  (\w+\.py)|^      (\w+/)", tree, flags=re.MULTILINE)
    found = ["".join(groups) for groups in names]
    assert {"adapters/", "app.py", "model/", "ingress/", "clients/"} <= set(found)
    for name in found:
        assert (ROOT / name).exists() or (ROOT / "deployments" / name).exists(), name


def test_the_engine_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(from adapters\.store.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(ROOT)
    lines = code.strip().splitlines()
    scope: dict[str, object] = {}
    exec("\n".join(lines[:-1]), scope)
    (answer,) = eval(lines[-1], scope)
    assert isinstance(answer, Prediction)
    assert sum(answer.scores) == pytest.approx(1)


def test_the_version_to_play_with_is_the_one_that_is_said(tmp_path: Path) -> None:
    """docs/catalog.md makes a version by a line of shell, and says what the answer names."""
    said = (ROOT / "docs" / "catalog.md").read_text()
    (line,) = re.findall(r"^ +(cp -r examples/store/spam .*)$", said, flags=re.MULTILINE)
    here = line.replace("/tmp/", f"{tmp_path}/")
    subprocess.run(["sh", "-c", here], cwd=ROOT, check=True)
    made = Directory(tmp_path).read("spam2").version
    assert made != Directory(ROOT / "examples" / "store").read("spam").version
    assert f'"version":"{made}"' in said
    assert f'{{"active": "{made}"}}' in said


def test_the_held_out_accuracy_is_what_the_engine_reaches() -> None:
    """`accuracy.json` was written by PEFT at training; the server's engine must reach it too."""
    claimed = json.loads((ROOT / "examples" / "accuracy.json").read_text())
    store = Directory(ROOT / "examples" / "store")
    assert sorted(claimed) == store.tasks()
    engine = Engine(str(ROOT / "examples" / "base"), quantization="none")
    tokenizer = Tokenizer(export_vocabulary(engine.encoder))
    for slot, (task, measured) in enumerate(claimed.items(), start=1):
        loaded = engine.read(store.read(task))
        engine.write(slot, loaded)
        lines = (ROOT / "examples" / "data" / f"{task}.heldout.jsonl").read_text().splitlines()
        held_out = [json.loads(line) for line in lines]
        assert len(held_out) == measured["rows"]
        right = 0
        for start in range(0, len(held_out), 32):
            part = held_out[start : start + 32]
            encoded = tokenizer.encode([row["text"] for row in part], 128)
            answers = engine.predict([Row(slot, given.tokens) for given in encoded])
            for row, answer in zip(part, answers, strict=True):
                assert isinstance(answer, Prediction)
                right += _labels(answer, loaded.artifact.labels, "labels" in row) == (
                    set(row["labels"]) if "labels" in row else {row["label"]}
                )
        assert right / len(held_out) == pytest.approx(measured["accuracy"], abs=1e-6), task


def _labels(answer: Prediction, names: tuple[str, ...], several: bool) -> set[str]:
    if several:
        return {name for name, logit in zip(names, answer.logits, strict=True) if logit >= 0}
    return {names[answer.logits.index(max(answer.logits))]}
