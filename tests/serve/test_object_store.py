"""A whole server whose store is a bucket: nothing but the bucket survives it."""

import shutil
import signal
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.clouds import Cloud

TEXTS = ["I absolutely loved this product!", "You have won a prize, call now."]


def call(server: Any, method: str, path: str, **given: Any) -> Any:
    answer = httpx2.request(method, f"{server.url}/v1/tasks/{path}", timeout=60, **given)
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


def upload(server: Any, folder: Path) -> str:
    files = [("files", (file.name, file.read_bytes())) for file in sorted(folder.iterdir())]
    return str(call(server, "PUT", "mood/versions", files=files)["version"])


def told(server: Any) -> list[Any]:
    """All that the server says of its tasks, and what they answer."""
    tasks = [call(server, "GET", name) for name in ("mood", "spam")]
    for task in tasks:
        del task["usage"]
    body = {"texts": TEXTS, "return_scores": True}
    answers = [call(server, "POST", f"{task['task']}/predict", json=body) for task in tasks]
    for answer in answers:
        del answer["timings_ms"]
    return [tasks, answers]


@pytest.mark.slow  # two starts each; tests/adapters has what a bucket does and does not
@pytest.mark.parametrize("cloud", ["s3", "gs"], indirect=True)
def test_what_was_uploaded_into_a_bucket_answers_the_same_after_a_restart(
    cloud: Cloud, server: Any, examples: Path, make_adapter: Any, oracle: Any, tmp_path: Path
) -> None:
    for file in (examples / "spam").iterdir():
        cloud.put(f"store/spam/{file.name}", file.read_bytes())
    made = [make_adapter(tmp_path / str(seed), seed=seed) for seed in range(2)]
    for folder in made:
        (folder / "README.md").unlink(missing_ok=True)
    cache = server.home / "cache"
    config = server.write_config(
        adapter_store=f"{cloud.scheme}://bucket/store",
        disk_cache=str(cache),
        quantization="none",
    )
    server.environment |= cloud.environment

    def start() -> None:
        server.start("-m", "deployments", config)
        server.wait_until(lambda: "ready" in server.log.read_text())
        server.wait_until(server.answers)

    start()
    first, second = (upload(server, folder) for folder in made)
    assert call(server, "GET", "mood")["active"] == first
    call(server, "PATCH", "mood", json={"active": second, "rules": {"labels": ["no", "yes"]}})
    before = told(server)
    answered = before[1][0]
    assert answered["version"] == second
    assert [list(one["probabilities"].values()) for one in answered["results"]] == [
        pytest.approx(scores, abs=1e-4) for scores in oracle.scores(made[1], TEXTS)
    ]
    assert {path.name for path in cache.glob("*/*@*")} >= {f"mood@{second}"}
    server.stop(signal.SIGTERM, as_terminal=False)
    shutil.rmtree(cache)
    start()
    assert told(server) == before
    call(server, "POST", "mood/rollback")
    assert call(server, "POST", "mood/predict", json={"texts": TEXTS})["version"] == first
