"""transformers' pipeline over the merged model says what our HTTP answer says (`test_inputs` has
token classification)."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TextClassificationPipeline,
)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TOLERANCE = 1e-3


@pytest.mark.parametrize("task", ["sentiment", "topic", "spam", "aspects"])
def test_the_pipeline_over_the_merged_model_agrees(task: str, ask: Any) -> None:
    rules = json.loads((EXAMPLES / "store" / task / "task.json").read_text("utf-8"))
    lines = (EXAMPLES / "data" / f"{task}.heldout.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines][:40]
    model = AutoModelForSequenceClassification.from_pretrained(
        EXAMPLES / "base",
        id2label=dict(enumerate(rules["labels"])),
        problem_type=rules.get("problem_type", "single_label_classification"),
    )
    adapter = str(EXAMPLES / "store" / task)
    pipeline = TextClassificationPipeline(
        model=PeftModel.from_pretrained(model, adapter).merge_and_unload().eval(),
        tokenizer=AutoTokenizer.from_pretrained(EXAMPLES / "base"),
    )
    expected = pipeline(texts, top_k=None, truncation=True, max_length=rules["max_length"])
    for ours, theirs in zip(ask(task, texts)["results"], expected, strict=True):
        scores = {one["label"]: one["score"] for one in theirs}
        assert ours["probabilities"] == pytest.approx(scores, abs=TOLERANCE)
        if isinstance(ours["prediction"], list):
            sure = {n: s for n, s in scores.items() if abs(s - 0.5) > TOLERANCE}
            assert {n for n in ours["prediction"] if n in sure} == {
                n for n in sure if sure[n] > 0.5
            }
        else:
            assert ours["prediction"] == theirs[0]["label"]
