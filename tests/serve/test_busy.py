"""Several model replicas on a machine that has far too much to do: no request may fail of that."""

import http.client
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
CALLERS, REQUESTS_EACH = 32, 150
BURNERS = 12 * (os.cpu_count() or 1)
TASKS = ("spam", "sentiment")  # of two labels, as many as are answered without a forward


@contextmanager
def burners() -> Iterator[None]:
    """Processes that compute for nobody."""
    burning = [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(BURNERS)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


def call(url: str, number: int) -> list[tuple[float, int, str]]:
    """Send requests over one connection; returns seconds, status and text of every answer."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port or 0, timeout=120)
    told = []
    for n in range(REQUESTS_EACH):
        path = f"{address.path}/v1/tasks/{TASKS[(number + n) % 2]}/predict"
        body = json.dumps({"text": f"the {n}th of caller {number}", "return_scores": True})
        started_s = time.monotonic()
        connection.request("POST", path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        told.append((time.monotonic() - started_s, response.status, text))
    connection.close()
    return told


@pytest.mark.slow
def test_no_request_fails_on_a_machine_without_a_cpu_to_spare(server: Any) -> None:
    args = {"adapter_store": str(ROOT / "examples" / "store"), "quantization": "none"}
    config = Path(server.write_config(**args, device="cpu", num_cpus=1, num_replicas=3))
    said = json.loads(config.read_text())
    said["applications"][0]["import_path"] = "benchmarks.noop.hop:build"  # without a forward
    config.write_text(json.dumps(said))
    server.environment["RAY_OVERRIDE_RESOURCES"] = '{"CPU": 8}'
    server.start("-m", "deployments", str(config))
    server.wait_until(server.answers)
    with burners(), ThreadPoolExecutor(CALLERS) as callers:
        told = [
            one
            for answers in callers.map(lambda number: call(server.url, number), range(CALLERS))
            for one in answers
        ]
    wrong = [one for one in told if one[1] != 200]
    assert not wrong, Counter((status, text) for _, status, text in wrong)
    assert len(told) == CALLERS * REQUESTS_EACH
    for _, _, text in told:
        (result,) = json.loads(text)["results"]
        assert set(result["probabilities"].values()) == {0.0}
    seconds = sorted(taken_s for taken_s, _, _ in told)
    print(f"{len(told)} requests beside {BURNERS} burners: slowest {seconds[-1]:.1f} s")
