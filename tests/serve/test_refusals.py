"""Adapters that cannot be served are refused by name, and nothing else is affected."""

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

TASKS = ("aspects", "sentiment", "spam", "topic")
BASE = Path(__file__).parents[2] / "examples" / "base"
WEIGHTS = "adapter_model.safetensors"
TEXTS = ["I absolutely loved this product!"]
HEAD = "base_model.model.classifier.weight"
STRAY = "base_model.model.bert.encoder.layer.99.attention.self.query.lora_A.weight"

# What the answer must say of each folder that the fixture makes.
SAID = {
    "other-shapes": ["is [4, 32], not [4, 384]", "is [32, 4], not [384, 4]"],
    "other-architecture": ["match nothing", "distilbert.transformer.layer.0"],
    "other-digest": ["base_sha256", "00000000…", "the base served here"],
    "headless": ["no head weights", "classifier.weight", "classifier.bias"],
    "only-pickle": ["adapter_model.bin", "pickle", "safe_serialization=True"],
    "stray": ["match nothing", "layer.99"],
    "not-finite": ["classifier.weight", "NaN"],
    "other-method": ["'LOHA'", "LORA (with DoRA) and IA3 are"],
    "unknown-rule": ["task.json", "temperature", "not a known rule"],
    "many": ["base_sha256", "match nothing", "layer.99", "no head weights"],
    "config-and-files": ["use_qalora=True", "base_sha256", "layer.99", "no head weights"],
    "pipe": [f"{WEIGHTS} is a pipe or device, not a file"],
    "linked-out": ["tokenizer.json is a link to outside of the store"],
    "endless-pattern": ["does not come to an end"],
    "absurd-rank": ["not [1000000000, 384]"],
    "absurd-header": [f"header of {2**60} bytes"],
    "deep-config": ["adapter_config.json is not valid JSON"],
    "half-a-pair": ["task.json holds what is no text"],
    "other-tokenizer": ["tokenizer.json is not the base's (normalizer)"],
}


class Explodes:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.file,)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def drop_head(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".classifier." in name]:
        del tensors[name]


def add_stray(tensors: dict[str, Any]) -> None:
    tensors[STRAY] = next(iter(tensors.values())).clone()


def spoil_head(tensors: dict[str, Any]) -> None:
    tensors[HEAD][0, 0] = float("nan")


def nasty(folders: dict[str, Path]) -> None:
    """Breaks folders in ways that might hold up, or end, whoever reads them."""
    endless = "(?:(?:[a-z]|[a-z.0-9])+)+[A-Z]"
    edit_json(folders["endless-pattern"] / "adapter_config.json", target_modules=endless)
    edit_json(folders["absurd-rank"] / "adapter_config.json", r=10**9)
    (folders["absurd-header"] / WEIGHTS).write_bytes((2**60).to_bytes(8, "little"))
    (folders["deep-config"] / "adapter_config.json").write_bytes(b"[" * 100_000)
    edit_json(folders["half-a-pair"] / "task.json", labels=["ham", "\ud800"])
    tokenizer = json.loads((BASE / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (folders["other-tokenizer"] / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.fixture(scope="module")
def refused(app: Any, make_adapter: Any, tmp_path_factory: Any) -> Iterator[Path]:
    """Puts every bad adapter of `SAID` into the store; yields what the pickle would touch."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        DistilBertConfig,
        DistilBertForSequenceClassification,
    )

    made = tmp_path_factory.mktemp("refused")
    marker = made / "the-pickle-was-opened"
    folders = {name: made / name for name in SAID}
    narrow = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2
    )
    distil = DistilBertConfig(dim=384, hidden_dim=64, n_layers=1, n_heads=2)
    make_adapter(folders["other-shapes"], base=BertForSequenceClassification(narrow))
    make_adapter(
        folders["other-architecture"],
        base=DistilBertForSequenceClassification(distil),
        targets=("q_lin", "v_lin"),
    )
    for name in SAID.keys() - {"other-shapes", "other-architecture"}:
        shutil.copytree(app.store / "spam", folders[name])
    edit_json(folders["other-digest"] / "task.json", base_sha256="0" * 64)
    edit_tensors(folders["headless"], drop_head)
    (folders["only-pickle"] / WEIGHTS).unlink()
    (folders["only-pickle"] / "adapter_model.bin").write_bytes(pickle.dumps(Explodes(marker)))
    edit_tensors(folders["stray"], add_stray)
    edit_tensors(folders["not-finite"], spoil_head)
    edit_json(folders["other-method"] / "adapter_config.json", peft_type="LOHA")
    edit_json(folders["unknown-rule"] / "task.json", temperature=2)
    for name in ("many", "config-and-files"):
        edit_json(folders[name] / "task.json", base_sha256="0" * 64)
        edit_tensors(folders[name], drop_head)
        edit_tensors(folders[name], add_stray)
    edit_json(folders["config-and-files"] / "adapter_config.json", use_qalora=True)
    nasty(folders)
    for name, folder in folders.items():
        shutil.copytree(folder, app.store / name)
    (app.store / "pipe" / WEIGHTS).unlink()
    os.mkfifo(app.store / "pipe" / WEIGHTS)
    (app.store / "linked-out" / "tokenizer.json").symlink_to(BASE / "tokenizer.json")
    yield marker
    for name in SAID:
        shutil.rmtree(app.store / name)


def post(http: httpx2.Client, task: str) -> httpx2.Response:
    return http.post(f"/v1/tasks/{task}/predict", json={"texts": TEXTS, "return_scores": True})


@pytest.mark.parametrize("name", SAID)
def test_a_bad_adapter_is_refused_by_name_with_all_its_problems(
    http: httpx2.Client, refused: Path, assert_problem: Any, name: str
) -> None:
    response = post(http, name)
    assert_problem(response, 503, f"task '{name}' was refused", *SAID[name])
    assert response.json()["title"] == "Adapter refused"
    assert "retry-after" not in response.headers
    assert_problem(http.get(f"/v1/tasks/{name}"), 503, *SAID[name])
    assert not refused.exists()


def test_all_others_go_on_while_bad_adapters_are_asked_for(
    http: httpx2.Client, refused: Path, ask: Any
) -> None:
    before = {task: ask(task, TEXTS)["results"] for task in TASKS}
    with ThreadPoolExecutor(16) as pool:
        bad = [pool.submit(post, http, name) for name in SAID for _ in range(3)]
        good = [(task, pool.submit(ask, task, TEXTS)) for task in TASKS for _ in range(6)]
        assert {future.result().status_code for future in bad} == {503}
        for task, future in good:
            (result,), (expected,) = future.result()["results"], before[task]
            assert result["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)


def test_the_listing_says_why_beside_the_tasks_that_are_served(
    http: httpx2.Client, refused: Path
) -> None:
    tasks = {task["task"]: task for task in http.get("/v1/tasks").json()["tasks"]}
    for name, words in SAID.items():
        assert tasks[name].keys() == {"task", "error", "usage"}
        assert f"{name!r} was refused" in tasks[name]["error"]
        assert words[0] in tasks[name]["error"]
    for name in TASKS:
        assert "error" not in tasks[name]
        assert tasks[name]["labels"]


def test_a_refused_adapter_is_served_once_it_is_mended(
    app: Any, http: httpx2.Client, ask: Any, assert_problem: Any
) -> None:
    folder = app.store / "mended"
    shutil.copytree(app.store / "spam", folder)
    try:
        edit_json(folder / "task.json", base_sha256="0" * 64)
        assert_problem(post(http, "mended"), 503, "base_sha256")
        shutil.copy2(app.store / "spam" / "task.json", folder)
        until_s = time.monotonic() + 10
        while post(http, "mended").status_code != 200:
            assert time.monotonic() < until_s
            time.sleep(0.1)
        assert ask("mended", TEXTS)["results"][0]["probabilities"] == pytest.approx(
            ask("spam", TEXTS)["results"][0]["probabilities"], abs=1e-5
        )
    finally:
        shutil.rmtree(folder)
