import ast
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

TEXTS = ["I absolutely loved this product!", "The service was terrible.", "It was okay."]


@pytest.fixture(scope="session")
def handle(app: Any) -> Any:
    from ray import serve

    return serve.get_app_handle("onebase")


def failure(call: Callable[[], Any]) -> Exception:
    """Returns what a handle call raises, as Ray found it in the replica."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  # The tests look at its type.
        call()
    assert isinstance(caught.value, type(caught.value.cause))
    return caught.value.cause


def without_timings(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "timings_ms"}


@pytest.mark.parametrize("task", ["sentiment", "topic", "spam", "aspects"])
@pytest.mark.parametrize("return_scores", [True, False])
def test_a_handle_call_gives_the_plain_dict_of_http(
    handle: Any, http: httpx2.Client, task: str, return_scores: bool
) -> None:
    answer = handle.predict.remote(task, TEXTS, return_scores=return_scores).result(timeout_s=60)
    body = {"texts": TEXTS, "return_scores": return_scores}
    over_http = http.post(f"/v1/tasks/{task}/predict", json=body).json()
    assert type(answer) is dict
    assert answer.keys() == over_http.keys()
    assert answer["timings_ms"].keys() == over_http["timings_ms"].keys()
    # A text literal and back: only builtin types print so that they can be read again.
    assert ast.literal_eval(repr(answer)) == answer
    ours, theirs = without_timings(answer), without_timings(over_http)
    for one, other in zip(ours.pop("results"), theirs.pop("results"), strict=True):
        for name, score in one.pop("probabilities", {}).items():
            assert score == pytest.approx(other["probabilities"].pop(name), abs=1e-5)
        assert one.pop("confidence", 0) == pytest.approx(other.pop("confidence", 0), abs=1e-5)
        assert one.items() <= other.items()
    assert ours == theirs


def test_a_single_text_and_a_tuple_are_taken_too(handle: Any) -> None:
    many = handle.predict.remote("sentiment", tuple(TEXTS)).result(timeout_s=60)
    one = handle.predict.remote("sentiment", TEXTS[0]).result(timeout_s=60)
    assert len(many["results"]) == len(TEXTS)
    assert one["results"] == many["results"][:1]


def test_a_threshold_travels_too(handle: Any) -> None:
    answer = handle.predict.remote("sentiment", TEXTS, threshold=1.0).result(timeout_s=60)
    assert answer["results"] == [{"prediction": "Uncertain"}] * len(TEXTS)


async def test_a_handle_call_can_be_awaited(handle: Any) -> None:
    answer = await handle.predict.remote("spam", TEXTS)
    assert [result["prediction"] in ("ham", "spam") for result in answer["results"]] == [True] * 3


def test_a_task_of_another_ray_app_can_be_handed_the_handle(handle: Any) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def elsewhere(passed: Any) -> Any:
        return passed.predict.remote("sentiment", "Good").result(timeout_s=60)["task"]

    assert ray.get(elsewhere.remote(handle), timeout=60) == "sentiment"


def test_an_unknown_task_is_a_lookup_error(handle: Any) -> None:
    error = failure(lambda: handle.predict.remote("nope", TEXTS).result(timeout_s=60))
    assert type(error) is LookupError
    assert "there is no task 'nope'" in str(error)
    assert "its PEFT folder into the adapter store" in str(error)


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        ([], {}, ["texts is empty", "give at least one text"]),
        (["fine", 3], {}, ["texts[1]", "string"]),
        (None, {}, ["either texts", "or text"]),
        (b"bytes", {}, ["text", "string"]),
        (["a"] * 1025, {}, ["1025 entries", "limit of 1024", "several requests"]),
        (["a"], {"threshold": 2}, ["threshold", "less than or equal to 1"]),
        (["a"], {"return_scores": "yes"}, ["return_scores", "boolean"]),
    ],
)
def test_bad_input_is_a_value_error_that_says_what_to_change(
    handle: Any, texts: Any, options: dict[str, Any], words: list[str]
) -> None:
    error = failure(
        lambda: handle.predict.remote("sentiment", texts, **options).result(timeout_s=60)
    )
    assert type(error) is ValueError
    for word in words:
        assert word in str(error)


def test_half_a_surrogate_pair_is_replaced_and_the_result_says_so(handle: Any) -> None:
    answer = handle.predict.remote("sentiment", "half a pair \ud800").result(timeout_s=60)
    assert answer["results"][0]["replaced_characters"] == 1


def test_an_adapter_that_cannot_be_served_is_a_runtime_error(handle: Any, app: Any) -> None:
    folder = app.store / "handle-broken"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    error = failure(lambda: handle.predict.remote("handle-broken", TEXTS).result(timeout_s=60))
    assert type(error) is RuntimeError
    assert "'handle-broken' was refused" in str(error)
    assert "'LOHA' is not served" in str(error)


@pytest.mark.parametrize("throughput", ["0", "1"])
def test_the_example_works_in_a_process_without_our_code(
    app: Any, http: httpx2.Client, run_example: Any, tmp_path: Path, throughput: str
) -> None:
    done = run_example(tmp_path, app.address, RAY_SERVE_THROUGHPUT_OPTIMIZED=throughput)
    assert done.returncode == 0, done.stderr
    answer = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert answer["task"] == "sentiment"
    assert answer["version"] == http.get("/v1/tasks/sentiment").json()["version"]
    assert set(answer["results"][0]["probabilities"]) == {"Negative", "Positive"}


@pytest.mark.slow  # installs Ray
def test_the_example_works_in_a_venv_that_has_ray_alone(
    app: Any, run_example: Any, tmp_path: Path
) -> None:
    import ray

    venv = tmp_path / "venv"
    python = venv / "bin" / "python"
    uv = shutil.which("uv") or f"{sys.prefix}/bin/uv"
    for command in (
        ["venv", "--python", sys.executable, venv],
        ["pip", "install", "--python", python, f"ray[serve]=={ray.__version__}"],
    ):
        subprocess.run([uv, *command], check=True, timeout=500)
    done = run_example(tmp_path, app.address, python=python)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout.strip().splitlines()[-1])["task"] == "sentiment"


def test_the_example_ends_with_the_sentence_of_an_error(
    app: Any, run_example: Any, tmp_path: Path
) -> None:
    done = run_example(tmp_path, app.address, "nope")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("LookupError: there is no task 'nope'")
    assert "Traceback" not in done.stderr
