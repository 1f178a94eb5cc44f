"""Text Embeddings Inference: it has no adapters, so a merged model and a server for each.

As its README has it for sequence classification: `text-embeddings-router --model-id FOLDER --port
PORT`, then `POST /predict`. A batch's rows are sent to all servers at once, those of a server as
one request. So its times are with tokenising and HTTP, and the others' here are without.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.peers import NotRun

BINARY = "text-embeddings-router"
# What it classifies with, by transformers' model types.
CLASSIFIERS = ("bert", "camembert", "modernbert", "roberta", "xlm-roberta")
START_S = 240
HOST = "127.0.0.1"


def find(model_type: str) -> str:
    """Return the version that is on PATH.

    Raises:
        NotRun: There is none, or it has no classifiers of the model type.
    """
    if shutil.which(BINARY) is None:
        raise NotRun(f"{BINARY} is not on PATH")
    if model_type not in CLASSIFIERS:
        raise NotRun(f"it has no classifiers of type {model_type}")
    said = subprocess.run([BINARY, "--version"], capture_output=True, text=True, timeout=60)
    return said.stdout.strip().removeprefix(BINARY).strip()


@contextmanager
def servers(
    models: Sequence[Path], dtype: str, start_s: float = START_S
) -> Iterator[Callable[[Sequence[str], Sequence[int]], list[dict[str, float]]]]:
    """Start a server a model; give what maps texts, and the model of each, to label -> score.

    Args:
        models: Folders of sequence classifiers with a tokenizer.
        dtype: float16 or float32.
        start_s: Until when all must be healthy.

    Raises:
        RuntimeError: A server does not start, or refuses a request, in its words.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = _free_ports(2 * len(models))
        started = []
        for index, model in enumerate(models):
            log = folder / f"{index}.log"
            process = _start(model, dtype, ports[2 * index], ports[2 * index + 1], log)
            stack.callback(_stop, process)
            started.append((process, ports[2 * index], log))
        until = time.monotonic() + start_s
        for process, port, log in started:
            _wait(process, port, log, until)
        connections = [http.client.HTTPConnection(HOST, port, timeout=60) for _, port, _ in started]
        for connection in connections:
            stack.callback(connection.close)
        # It ends before they close: a request that is still on its way would open one again.
        pool = stack.enter_context(ThreadPoolExecutor(len(models)))

        def answer(texts: Sequence[str], of: Sequence[int]) -> list[dict[str, float]]:
            rows = {model: [row for row, own in enumerate(of) if own == model] for model in of}
            asked = {
                model: pool.submit(_predict, connections[model], [texts[row] for row in own])
                for model, own in rows.items()
            }
            found = {
                row: scores
                for model, own in rows.items()
                for row, scores in zip(own, asked[model].result(), strict=True)
            }
            return [found[row] for row in range(len(texts))]

        yield answer


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def _start(
    model: Path, dtype: str, port: int, metrics_port: int, log: Path
) -> subprocess.Popen[bytes]:
    command = [BINARY, "--model-id", str(model), "--hostname", HOST, "--port", str(port)]
    # Several on one machine share its cores, and may not share a port or a socket.
    command += ["--dtype", dtype, "--tokenization-workers", "1", "--uds-path", f"{log}.socket"]
    # An option of newer versions only; older ones do not look at the variable.
    environment = os.environ | {"PROMETHEUS_PORT": str(metrics_port)}
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path, until: float) -> None:
    """Return when a server is healthy."""
    while True:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").strip().splitlines() or ["no word of it"]
            raise RuntimeError(f"a server ended with {process.returncode}: {lines[-1]}")
        connection = http.client.HTTPConnection(HOST, port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        if time.monotonic() > until:
            raise RuntimeError("a server was not healthy in time")
        time.sleep(0.1)


def _predict(connection: http.client.HTTPConnection, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Ask one server for all its rows; a row is a list, since a list of two texts is a pair."""
    body = json.dumps({"inputs": [[text] for text in texts]})
    connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    said = response.read().decode(errors="replace")
    if response.status != 200:
        raise RuntimeError(f"/predict answers {response.status}: {said}")
    return [{one["label"]: one["score"] for one in row} for row in json.loads(said)]
