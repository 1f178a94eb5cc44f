"""The first rows that a new replica answers take no longer than later ones."""

import itertools
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from tests.serve.head import Head, fast_path, wait_until
from tests.serve.recording import ROWS

BASE = Path(__file__).resolve().parents[2] / "examples" / "base"
CONNECTIONS = 8
FIRST, STEADY_FROM, STEADY_TO = 100, 300, 900
MOST_SLOWER = 1.5
OTHERS = ("aspects", "sentiment", "topic")


class Closed:
    """Connections that ask one text after another, each text once."""

    def __init__(self, url: str) -> None:
        self._url, self._numbers = f"{url}/v1/tasks/spam/predict", itertools.count(100_000)
        self.ending = threading.Event()
        self.took_s: dict[str, float] = {}

    def ask(self) -> None:
        with httpx2.Client(timeout=60) as client:
            while not self.ending.is_set():
                text = f"The parcel with number {next(self._numbers)} came late again."
                sent_s = time.perf_counter()
                response = client.post(self._url, json={"texts": [text]})
                assert response.status_code == 200, response.text
                self.took_s[text] = time.perf_counter() - sent_s


def p95(took_s: list[float]) -> float:
    return sorted(took_s)[int(len(took_s) * 0.95)]


@pytest.mark.slow
def test_the_first_rows_of_a_new_replica_take_no_longer(short_dir: Path, examples: Path) -> None:
    from transformers import AutoTokenizer

    folder = short_dir / "r"  # HAProxy has a socket below it
    store = Path(shutil.copytree(examples, folder / "store"))
    head = Head(folder, fast_path(folder))

    def deploy(num_replicas: int) -> None:
        head.deploy(
            [{"name": "Model", "num_replicas": num_replicas}],
            import_path="tests.serve.recording:build",
            adapter_store=str(store),
            quantization="none",
            num_cpus=1,
        )

    def rows_of(pid: int) -> list[tuple[int, ...]]:
        path = folder / ROWS.format(pid=pid)
        whole = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [tuple(json.loads(line)) for line in whole if line.endswith("\n")]

    try:
        deploy(1)
        wait_until(head.answers)
        (old,) = head.running("Model")
        load = Closed(head.url)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            asking = [pool.submit(load.ask) for _ in range(CONNECTIONS)]
            try:
                wait_until(lambda: len(load.took_s) > STEADY_FROM)
                alone = [*load.took_s.values()][FIRST:]
                for task in OTHERS:
                    url = f"{head.url}/v1/tasks/{task}/predict"
                    assert httpx2.post(url, json={"text": "once"}).status_code == 200
                deploy(2)
                wait_until(lambda: len(head.running("Model")) == 2)
                (new,) = {*head.running("Model")} - {old}
                told = httpx2.get(f"{head.url}/v1/residency").json()["versions"]
                where = {one["task"]: [*one["replicas"].values()] for one in told}
                # Nobody has asked it for these.
                assert [where[task] for task in OTHERS] == [[{"where": "slot"}] * 2] * len(OTHERS)
                wait_until(lambda: len(rows_of(new)) > STEADY_TO)
            finally:
                load.ending.set()
            for asked in asking:
                asked.result()
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        took_s = {tuple(tokenizer(text)["input_ids"]): s for text, s in load.took_s.items()}
        of_new = [took_s[ids] for ids in rows_of(new)]
    finally:
        head.stop()
    first, steady = p95(of_new[:FIRST]), p95(of_new[STEADY_FROM:STEADY_TO])
    print(f"p95: alone {p95(alone):.3f} s, first {first:.3f} s, steady {steady:.3f} s")
    assert first <= MOST_SLOWER * steady
