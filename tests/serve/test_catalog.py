"""Versions come, answer, are split, rolled back and go, over HTTP (no HAProxy)."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["I absolutely loved this product!", "You have won a prize, call now."]


class Tasks:
    """The application's change routes, as a person with curl uses them."""

    def __init__(self, http: httpx2.Client, prefix: str) -> None:
        self._http, self._prefix = http, f"{prefix}/v1"

    def call(self, method: str, path: str, **given: Any) -> httpx2.Response:
        return self._http.request(method, f"{self._prefix}/{path}", timeout=60, **given)

    def upload(self, task: str, folder: Path, **query: Any) -> httpx2.Response:
        files = [("files", (file.name, file.read_bytes())) for file in sorted(folder.iterdir())]
        return self.call("PUT", f"tasks/{task}/versions", files=files, params=query)

    def patch(self, task: str, headers: dict[str, str] | None = None, **change: Any) -> Any:
        response = self.call("PATCH", f"tasks/{task}", json=change, headers=headers or {})
        assert response.status_code == 200, response.text
        return response.json()

    def get(self, task: str) -> Any:
        response = self.call("GET", f"tasks/{task}")
        assert response.status_code == 200, response.text
        return response.json()

    def predict(self, task: str, texts: list[str] = TEXTS, key: str | None = None) -> Any:
        headers = {} if key is None else {"x-routing-key": key}
        body = {"texts": texts, "return_scores": True}
        response = self.call("POST", f"tasks/{task}/predict", json=body, headers=headers)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("catalog") / "store"
    shutil.copytree(ROOT / "examples" / "store", store)
    return store


@pytest.fixture(scope="module")
def tasks(app: Any, http: httpx2.Client, store: Path) -> Iterator[Tasks]:
    """The examples' tasks behind two model replicas at /cat."""
    from ray import serve

    from deployments.app import build
    from deployments.config import Args

    args = Args(
        base_model=str(ROOT / "examples" / "base"),
        adapter_store=str(store),
        quantization="none",
        device="cpu",
        num_cpus=1,
        num_replicas=2,
    )
    serve.run(build(args), name="cat", route_prefix="/cat")
    yield Tasks(http, "/cat")
    serve.delete("cat")


@pytest.fixture(scope="module")
def made(make_adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four adapters of two labels, each of which answers otherwise."""
    folder = tmp_path_factory.mktemp("made")
    folders = [make_adapter(folder / str(seed), seed=seed) for seed in range(4)]
    for made in folders:
        (made / "README.md").unlink(missing_ok=True)
        (made / "task.json").write_text(json.dumps({"labels": ["no", "yes"], "max_length": 64}))
    return folders


@pytest.fixture
def named(tasks: Tasks, made: list[Path], request: pytest.FixtureRequest) -> Iterator[Any]:
    """Uploads adapters as versions of a new task; returns its name and the versions."""
    names: list[str] = []

    def upload(count: int) -> tuple[str, list[str]]:
        name = f"{request.node.name.removeprefix('test_')[:40]}-{len(names)}".replace("_", "-")
        names.append(name)
        answers = [tasks.upload(name, folder) for folder in made[:count]]
        assert [answer.status_code for answer in answers] == [201] * count, answers[0].text
        return name, [answer.json()["version"] for answer in answers]

    yield upload
    for name in names:
        tasks.call("DELETE", f"tasks/{name}")


def scores(answer: dict[str, Any]) -> list[list[float]]:
    return [list(result["probabilities"].values()) for result in answer["results"]]


def close(ours: list[list[float]], theirs: list[list[float]]) -> bool:
    return all(a == pytest.approx(b, abs=1e-4) for a, b in zip(ours, theirs, strict=True))


def wait_for(happened: Callable[[], bool], within_s: float = 10.0) -> float:
    started_s = time.monotonic()
    while not happened():
        assert time.monotonic() - started_s < within_s, "it never happened"
        time.sleep(0.02)
    return time.monotonic() - started_s


def test_an_upload_is_served_by_its_own_weights(
    tasks: Tasks, named: Any, made: list[Path], oracle: Any
) -> None:
    name, (first, second) = named(2)
    answer = tasks.predict(name)
    assert answer["version"] == first
    assert close(scores(answer), oracle.scores(made[0], TEXTS, max_length=64))
    told = tasks.get(name)
    assert told["active"] == first
    assert set(told["versions"]) == {first, second}
    again = tasks.upload(name, made[1])
    assert (again.status_code, again.json()["version"]) == (200, second)


def test_an_activated_version_answers_after_the_200_and_rolls_back(
    tasks: Tasks, named: Any, made: list[Path], oracle: Any
) -> None:
    name, (first, second) = named(2)
    want = [oracle.scores(folder, TEXTS, max_length=64) for folder in made[:2]]
    assert not close(*want)
    for _ in range(3):
        tasks.patch(name, active=second)
        for _ in range(8):
            answer = tasks.predict(name)
            assert answer["version"] == second
            assert close(scores(answer), want[1])
        assert tasks.call("POST", f"tasks/{name}/rollback").status_code == 200
        answer = tasks.predict(name)
        assert answer["version"] == first
        assert close(scores(answer), want[0])


def test_an_upload_that_cannot_be_served_leaves_nothing(
    tasks: Tasks, named: Any, made: list[Path], store: Path, tmp_path: Path, assert_problem: Any
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(made[0], broken)
    config = json.loads((broken / "adapter_config.json").read_bytes())
    config |= {"task_type": "CAUSAL_LM", "r": 3}
    (broken / "adapter_config.json").write_text(json.dumps(config))
    before = sorted(path for path in store.rglob("*") if path.is_file())
    assert_problem(tasks.upload("broken", broken), 422, "CAUSAL_LM", "task_type")
    assert sorted(path for path in store.rglob("*") if path.is_file()) == before
    assert tasks.call("GET", "tasks/broken").status_code == 404


def test_traffic_is_split_and_a_key_sticks(tasks: Tasks, named: Any) -> None:
    name, (first, second, third) = named(3)
    tasks.patch(name, traffic={second: 0.25, third: 0.25})
    versions = [tasks.predict(name, ["short"])["version"] for _ in range(80)]
    counted = {version: versions.count(version) for version in (first, second, third)}
    assert counted == {first: 40, second: 20, third: 20}
    for key in ("anna", "ben", "carla", "dora"):
        assert len({tasks.predict(name, ["short"], key)["version"] for _ in range(5)}) == 1
    tasks.patch(name, traffic={})
    assert {tasks.predict(name, ["short"])["version"] for _ in range(10)} == {first}


def test_a_version_with_traffic_is_not_deleted(
    tasks: Tasks, named: Any, store: Path, assert_problem: Any
) -> None:
    name, (first, second) = named(2)
    tasks.patch(name, traffic={second: 0.5})
    refused = tasks.call("DELETE", f"tasks/{name}/versions/{second}")
    assert_problem(refused, 409, second, "traffic")
    tasks.patch(name, traffic={})
    assert tasks.call("DELETE", f"tasks/{name}/versions/{second}").status_code == 200
    assert set(tasks.get(name)["versions"]) == {first}
    wait_for(lambda: not (store / name / second).exists(), 20)
    assert tasks.predict(name)["version"] == first


def test_if_match_guards_against_lost_updates(
    tasks: Tasks, named: Any, assert_problem: Any
) -> None:
    name, _ = named(1)
    read = tasks.call("GET", f"tasks/{name}")
    etag = read.headers["etag"]
    tasks.patch(name, headers={"if-match": etag}, pinned=True)
    late = tasks.call("PATCH", f"tasks/{name}", json={"pinned": False}, headers={"if-match": etag})
    assert_problem(late, 412, name)
    assert tasks.get(name)["pinned"] is True


def test_rules_are_laid_over_and_taken_back(tasks: Tasks, named: Any, assert_problem: Any) -> None:
    name, _ = named(1)
    before = tasks.predict(name)
    tasks.patch(name, rules={"threshold": 1.0, "labels": ["bad", "good"]})
    ruled = tasks.predict(name)
    assert [one["prediction"] for one in ruled["results"]] == ["Uncertain"] * 2
    assert list(ruled["results"][0]["probabilities"]) == ["bad", "good"]
    assert ruled["rules"] != before["rules"]
    wrong = tasks.call("PATCH", f"tasks/{name}", json={"rules": {"labels": ["one"]}})
    assert_problem(wrong, 422, "label")
    unknown = tasks.call("PATCH", f"tasks/{name}", json={"rules": {"treshold": 1}})
    assert_problem(unknown, 422, "treshold")
    tasks.patch(name, rules={"threshold": None, "labels": None})
    after = tasks.predict(name)
    assert after["rules"] == before["rules"]
    assert close(scores(after), scores(before))


def test_a_plain_folder_is_taken_in_by_its_first_change_and_goes_on(
    tasks: Tasks, made: list[Path], store: Path
) -> None:
    before = tasks.predict("spam")
    tasks.patch("spam", pinned=True)
    assert tasks.predict("spam")["version"] == before["version"]
    assert (store / "spam" / before["version"] / "adapter_config.json").is_file()
    for file in made[2].iterdir():
        shutil.copy(file, store / "spam" / file.name)
    wait_for(lambda: tasks.predict("spam")["version"] != before["version"])
    assert len(tasks.get("spam")["versions"]) == 2
    assert tasks.call("POST", "tasks/spam/rollback").status_code == 200
    assert close(scores(tasks.predict("spam")), scores(before))


def test_folders_dropped_by_hand_appear_within_two_seconds(
    tasks: Tasks, store: Path, made: list[Path], named: Any
) -> None:
    shutil.copytree(made[0], store / "dropped")
    path = "tasks/dropped/predict"
    body = {"texts": TEXTS}
    took_s = wait_for(lambda: tasks.call("POST", path, json=body).status_code == 200)
    print(f"a plain folder answered after {took_s:.2f} s")
    assert took_s < 2.0
    name, (_, second) = named(2)
    (store / "by-hand").mkdir()
    shutil.copytree(store / name / second, store / "by-hand" / second)
    path = "tasks/by-hand/predict"
    took_s = wait_for(lambda: tasks.call("POST", path, json=body).status_code == 200)
    print(f"a version folder answered after {took_s:.2f} s")
    assert took_s < 3.0
    assert tasks.predict("by-hand")["version"] == second
    assert tasks.call("DELETE", "tasks/by-hand").status_code == 200
    assert tasks.call("DELETE", "tasks/dropped").status_code == 200


def test_a_deleted_task_is_gone_at_once_its_files_a_little_later(
    tasks: Tasks, named: Any, store: Path
) -> None:
    name, _ = named(1)
    tasks.predict(name)
    assert tasks.call("DELETE", f"tasks/{name}").status_code == 200
    for _ in range(5):
        gone = tasks.call("POST", f"tasks/{name}/predict", json={"texts": TEXTS})
        assert gone.status_code == 404
    wait_for(lambda: not (store / name).exists(), 20)
    assert not [one for one in tasks.call("GET", "residency").json()["versions"]
                if one["task"] == name]  # fmt: skip


def test_golden_answers_decide_over_an_activation(
    tasks: Tasks, named: Any, made: list[Path], tmp_path: Path, oracle: Any, assert_problem: Any
) -> None:
    name, (first,) = named(1)
    want = oracle.scores(made[1], TEXTS, max_length=64)
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder, wanted in ((good, want), (bad, [row[::-1] for row in want])):
        shutil.copytree(made[1] if folder is good else made[2], folder)
        lines = [
            json.dumps({"text": text, "scores": {"no": no, "yes": yes}, "tolerance": 1e-3})
            for text, (no, yes) in zip(TEXTS, wanted, strict=True)
        ]
        (folder / "golden.jsonl").write_text("\n".join(lines))
    refused = tasks.upload(name, bad, activate=True)
    assert_problem(refused, 422, "golden.jsonl", "line 1")
    assert set(tasks.get(name)["versions"]) == {first}
    accepted = tasks.upload(name, good, activate=True)
    assert accepted.status_code == 201, accepted.text
    assert tasks.predict(name)["version"] == accepted.json()["version"]


def test_a_shadow_is_counted_and_answers_nobody(tasks: Tasks, named: Any) -> None:
    name, (first, second) = named(2)
    tasks.patch(name, shadow={"version": second, "share": 1.0})
    for _ in range(20):
        assert tasks.predict(name, ["I loved it"])["version"] == first

    def counted() -> Any:
        return (tasks.get(name)["usage"] or {}).get(second, {}).get("shadow", {})

    wait_for(lambda: counted().get("num_rows", 0) >= 5)
    assert 0 <= counted()["agreement"] <= 1
    assert counted()["mean_score_shift"] > 0


def test_every_change_is_in_the_history(tasks: Tasks, named: Any) -> None:
    name, (_, second) = named(2)
    tasks.patch(name, active=second)
    told = tasks.call("GET", f"history?task={name}").json()["changes"]
    assert told[0]["what"] == {"active": second}
    assert len(told) == 3
    assert all(one["by"] and one["time"] and one["task"] == name for one in told)
    assert [one["revision"] for one in told] == sorted(
        (one["revision"] for one in told), reverse=True
    )


def test_residency_says_who_holds_what(tasks: Tasks, named: Any) -> None:
    name, (first, second) = named(2)
    told = tasks.call("GET", "residency?limit=1000").json()
    replicas = {one["replica"] for one in told["replicas"]}
    assert len(replicas) == 2
    (held,) = [one for one in told["versions"] if (one["task"], one["version"]) == (name, first)]
    assert {name: one["where"] for name, one in held["replicas"].items()} == dict.fromkeys(
        replicas, "slot"
    )
    others = [one["version"] for one in told["versions"] if one["task"] == name]
    assert second not in others, "it was checked, and then kept nowhere"
