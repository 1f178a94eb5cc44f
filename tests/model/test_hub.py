"""A base by its hub id, from a small local server that speaks the hub's routes."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Prints what was loaded, or the sentence that stops the start.
LOAD = """
import sys
from deployments.base import BaseName, BaseUnavailable
from deployments.model.engine import Engine
for base in sys.argv[1:]:
    try:
        engine = Engine(base, quantization="none")
        print("loaded", engine.encoder.geometry.base_id, engine.encoder.sha256)
    except BaseUnavailable as error:
        print("refused", error)
"""


@pytest.fixture(scope="module")
def hub(tiny_base: str) -> Iterator[str]:
    """Serves tiny_base as org/tiny at the revision v1; main is empty, org/gated is gated."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(send=True)

        def do_HEAD(self) -> None:
            self._answer(send=False)

        def _answer(self, send: bool) -> None:
            org_tiny = f"/org/tiny/resolve/{'v1' if '/v1/' in self.path else COMMIT}/"
            file = Path(tiny_base) / self.path.removeprefix(org_tiny)
            if self.path.startswith("/org/gated/"):
                self._refuse(403, "GatedRepo", "Access to model org/gated is restricted")
            elif not self.path.startswith("/org/tiny/"):
                self._refuse(404, "RepoNotFound", "Repository not found")
            elif not self.path.startswith((org_tiny, "/org/tiny/resolve/main/")):
                self._refuse(404, "RevisionNotFound", "Invalid rev id")
            elif not file.is_file():
                self._refuse(404, "EntryNotFound", "Entry not found")
            else:
                content = file.read_bytes()
                self.send_response(200)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if send:
                    self.wfile.write(content)

        def _refuse(self, status: int, code: str, message: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def load(*bases: str, cache: Path, **environment: str) -> list[str]:
    """Loads bases in a process of its own, since the hub's variables are read at import."""
    variables = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *bases],
        cwd=ROOT,
        env={**os.environ, **variables, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith(("loaded", "refused"))]


def test_a_hub_id_with_a_revision_loads_and_then_loads_offline(
    hub: str, tiny_base: str, tmp_path: Path
) -> None:
    weights = (Path(tiny_base) / "model.safetensors").read_bytes()
    told = f"loaded org/tiny {hashlib.sha256(weights).hexdigest()}"
    assert load("org/tiny@v1", cache=tmp_path, HF_ENDPOINT=hub) == [told]
    assert load("org/tiny@v1", cache=tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1") == [told]


def test_a_base_that_cannot_be_had_is_refused_in_one_sentence(hub: str, tmp_path: Path) -> None:
    reasons = {"org/gated": "gated", "org/missing": "not a", "org/tiny@v2": "revision"}
    told = load(*reasons, cache=tmp_path, HF_ENDPOINT=hub)
    assert len(told) == len(reasons)
    for sentence, (base, reason) in zip(told, reasons.items(), strict=True):
        assert sentence.startswith(f"refused base_model={base!r} cannot be loaded: ")
        assert reason in sentence
