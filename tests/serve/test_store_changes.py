"""Folders come, change and go while the server runs."""

import json
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

TASKS = ("aspects", "sentiment", "spam", "topic")
WEIGHTS = "adapter_model.safetensors"
TEXTS = ["I absolutely loved this product!", "You have won a prize, call now."]
SWOLLEN_BYTES = 2**26  # larger than LoRA on all linears of a base of 400 million is
SOON_S = 10.0  # a folder is looked at every second; the rest is for busy machines


@pytest.fixture
def place(app: Any) -> Iterator[Callable[[str], Path]]:
    """Returns the path of a folder in the store, removed after the test."""
    folders: list[Path] = []

    def folder(name: str) -> Path:
        folders.append(app.store / name)
        return folders[-1]

    yield folder
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)


def post(http: httpx2.Client, task: str) -> httpx2.Response:
    return http.post(f"/v1/tasks/{task}/predict", json={"texts": TEXTS, "return_scores": True})


def probabilities(answer: dict[str, Any]) -> list[list[float]]:
    return [list(result["probabilities"].values()) for result in answer["results"]]


def close(ours: list[list[float]], theirs: list[list[float]]) -> bool:
    return all(
        one == pytest.approx(other, abs=1e-4) for one, other in zip(ours, theirs, strict=True)
    )


def wait_for(happened: Callable[[], bool]) -> None:
    until_s = time.monotonic() + SOON_S
    while not happened():
        assert time.monotonic() < until_s, "it never happened"
        time.sleep(0.05)


def test_a_folder_copied_in_is_served_on_its_first_request(
    app: Any, ask: Any, oracle: Any, make_adapter: Any, place: Any, tmp_path: Path
) -> None:
    made = make_adapter(tmp_path / "made", rank=11, labels=7, targets=("key", "intermediate.dense"))
    shutil.copytree(made, place("added"))
    answer = ask("added", TEXTS)
    assert list(answer["results"][0]["probabilities"]) == [f"LABEL_{i}" for i in range(7)]
    assert close(probabilities(answer), oracle.scores(made, TEXTS))


def test_others_are_answered_as_fast_as_ever_while_folders_load(
    app: Any, http: httpx2.Client, ask: Any, place: Any
) -> None:
    names = [f"loading-{index}" for index in range(8)]
    for name in names:
        shutil.copytree(app.store / "spam", place(name))
        swell(app.store / name / WEIGHTS, SWOLLEN_BYTES)

    def seconds_until(enough: Callable[[int], bool]) -> list[float]:
        taken_s: list[float] = []
        while not enough(len(taken_s)):
            started_s = time.perf_counter()
            ask(TASKS[len(taken_s) % len(TASKS)], TEXTS)
            taken_s.append(time.perf_counter() - started_s)
        return taken_s

    seconds_until(lambda count: count == 8)
    before_s = seconds_until(lambda count: count == 40)
    with ThreadPoolExecutor(1) as pool:
        loads = [pool.submit(post, http, name) for name in names]
        during_s = seconds_until(lambda _: loads[-1].done())
    for load in loads:
        assert load.result().status_code == 200
        assert probabilities(load.result().json()) == probabilities(ask("spam", TEXTS))
    assert len(during_s) > 10
    print(f"longest {max(during_s):.3f} s of {sum(during_s):.1f} s, before {max(before_s):.3f} s")
    assert statistics.median(during_s) < 3 * statistics.median(before_s) + 0.05
    assert max(during_s) < 3 * max(before_s) + 0.2


def swell(file: Path, num_bytes: int) -> None:
    """Adds a long tensor that PEFT may store and nobody reads, so that the file takes a while."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header["base_model.model.classifier.original_module.weight"] = {
        "dtype": "F32",
        "shape": [num_bytes // 4],
        "data_offsets": [len(data), len(data) + num_bytes],
    }
    start = json.dumps(header).encode()
    start += b" " * (-len(start) % 8)
    with file.open("wb") as swollen:
        swollen.write(len(start).to_bytes(8, "little") + start + data)
        swollen.truncate(swollen.tell() + num_bytes)


def test_a_folder_on_its_way_in_is_neither_served_nor_remembered_as_failed(
    app: Any, http: httpx2.Client, ask: Any, assert_problem: Any, place: Any
) -> None:
    folder = place("halfway")
    folder.mkdir()
    shutil.copy2(app.store / "spam" / "task.json", folder)
    assert_problem(post(http, "halfway"), 404, "no task 'halfway'")
    shutil.copy2(app.store / "spam" / "adapter_config.json", folder)
    response = post(http, "halfway")
    assert_problem(response, 503, "'halfway'", "not complete yet", f"{WEIGHTS} is missing")
    assert response.headers["retry-after"] == "1"
    whole = (app.store / "spam" / WEIGHTS).read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for written in (4, 8 + header // 2, 8 + header, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:written])
        response = post(http, "halfway")
        assert_problem(response, 503, "'halfway'", "not complete yet", f"{written} ", "bytes")
        assert response.json()["title"] == "Adapter incomplete"
    with (folder / WEIGHTS).open("ab") as weights:
        weights.write(whole[-1:])
    assert close(probabilities(ask("halfway", TEXTS)), probabilities(ask("spam", TEXTS)))


def test_a_request_waits_for_a_copy_that_is_going_on(
    app: Any, http: httpx2.Client, ask: Any, place: Any
) -> None:
    folder = place("arriving")
    folder.mkdir()
    shutil.copy2(app.store / "spam" / "adapter_config.json", folder)
    whole = (app.store / "spam" / WEIGHTS).read_bytes()
    with ThreadPoolExecutor(1) as pool, (folder / WEIGHTS).open("wb", buffering=0) as weights:
        waiting = pool.submit(post, http, "arriving")
        for start in range(0, len(whole), len(whole) // 8 + 1):
            time.sleep(0.2)
            assert not waiting.done()
            weights.write(whole[start : start + len(whole) // 8 + 1])
        assert waiting.result().status_code == 200, waiting.result().text
    assert close(probabilities(waiting.result().json()), probabilities(ask("spam", TEXTS)))


def test_a_changed_folder_becomes_a_new_version_and_the_old_answers_until_it_is_whole(
    app: Any, ask: Any, oracle: Any, make_adapter: Any, place: Any, tmp_path: Path
) -> None:
    made = [make_adapter(tmp_path / f"made{seed}", seed=seed) for seed in (1, 2)]
    expected = [oracle.scores(folder, TEXTS) for folder in made]
    assert not close(*expected)
    folder = place("changing")
    shutil.copytree(made[0], folder)
    old = ask("changing", TEXTS)
    whole = (made[1] / WEIGHTS).read_bytes()
    with (folder / WEIGHTS).open("wb", buffering=0) as weights:
        weights.write(whole[: len(whole) // 2])
        until_s = time.monotonic() + 2.5
        while time.monotonic() < until_s:
            answer = ask("changing", TEXTS)
            assert answer["version"] == old["version"]
            assert close(probabilities(answer), expected[0])
        weights.write(whole[len(whole) // 2 :])
    answers = []

    def new_version_answers() -> bool:
        answers.append(ask("changing", TEXTS))
        return answers[-1]["version"] != old["version"]

    wait_for(new_version_answers)
    for answer in answers:
        is_new = answer["version"] != old["version"]
        assert close(probabilities(answer), expected[is_new])


def test_changed_rules_hold_for_the_same_version(app: Any, ask: Any, place: Any) -> None:
    folder = place("ruled")
    shutil.copytree(app.store / "spam", folder)
    before = ask("ruled", TEXTS)
    rules = json.loads((folder / "task.json").read_bytes())
    (folder / "task.json").write_text(json.dumps({**rules, "threshold": 1.0}))
    wait_for(lambda: ask("ruled", TEXTS)["results"][0]["prediction"] == "Uncertain")
    after = ask("ruled", TEXTS)
    assert after["version"] == before["version"]
    assert close(probabilities(after), probabilities(before))


def test_a_deleted_folder_is_no_task_any_more_until_it_is_back(
    app: Any, http: httpx2.Client, ask: Any, assert_problem: Any, place: Any
) -> None:
    folder = place("fleeting")
    shutil.copytree(app.store / "spam", folder)
    before = ask("fleeting", TEXTS)
    shutil.rmtree(folder)
    wait_for(lambda: post(http, "fleeting").status_code != 200)
    assert_problem(post(http, "fleeting"), 404, "no task 'fleeting'", "GET /v1/tasks")
    assert "fleeting" not in [task["task"] for task in http.get("/v1/tasks").json()["tasks"]]
    shutil.copytree(app.store / "spam", folder)
    assert ask("fleeting", TEXTS)["version"] == before["version"]


def test_more_adapters_than_slots_are_all_answered_right_in_any_order(
    app: Any, ask: Any, oracle: Any, make_adapter: Any, tmp_path: Path
) -> None:
    from ray import serve

    from deployments.app import build
    from deployments.config import Args

    store = tmp_path / "store"
    shutil.copytree(app.store, store, ignore=lambda _, names: [])
    for index in range(3):
        make_adapter(store / f"more{index}", rank=2 + index, labels=3 + index, seed=index)
    args = Args(
        base_model=str(Path(__file__).resolve().parents[2] / "examples" / "base"),
        adapter_store=str(store),
        adapter_slots=2,
        quantization="none",
        device="cpu",
        num_cpus=1,
    )
    serve.run(build(args), name="small", route_prefix="/small")
    try:
        tasks = [*TASKS, "more0", "more1", "more2"]
        rng = random.Random(11)
        calls = [task for task in tasks for _ in range(12)]
        rng.shuffle(calls)
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda task: ask(task, TEXTS, prefix="/small"), calls))
    finally:
        serve.delete("small")
    expected = {
        task: oracle.scores(store / task, TEXTS, multi_label=task == "aspects") for task in tasks
    }
    for task, answer in zip(calls, answers, strict=True):
        assert answer["task"] == task
        assert close(probabilities(answer), expected[task]), task
