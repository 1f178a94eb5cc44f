"""A forward that never ends: its callers are told, and the replica is replaced."""

import shutil
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_a_hung_forward_is_noticed_and_its_replica_replaced(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    import deployments.app
    from deployments.config import Args
    from deployments.model.deployment import Model

    once = tmp_path / "hung"

    class Hanging(Model):
        async def __init__(self, args: Args) -> None:
            import threading

            await Model.__init__(self, args)
            real = self.engine.predict

            def predict(rows: Any) -> Any:
                if not once.exists() and any(row.num_tokens > 20 for row in rows):
                    once.touch()
                    threading.Event().wait()
                return real(rows)

            self.engine.predict = predict

    monkeypatch.setattr(deployments.app, "Model", Hanging)
    store = tmp_path / "store"
    shutil.copytree(ROOT / "examples" / "store", store)
    args = Args(
        base_model=str(ROOT / "examples" / "base"),
        adapter_store=str(store),
        quantization="none",
        device="cpu",
        num_cpus=1,
    )
    serve.run(deployments.app.build(args), name="hung", route_prefix="/hung")
    url = f"{cluster}/hung/v1/tasks/spam/predict"

    def ask(text: str) -> int:
        return httpx2.post(url, json={"text": text}, timeout=60).status_code

    try:
        assert ask("fine") == 200
        started_s = time.monotonic()
        assert ask("word " * 40) in (200, 503)
        told_s = time.monotonic() - started_s
        while ask("fine") != 200:
            assert time.monotonic() < started_s + 120  # a start is long on busy cores
            time.sleep(0.2)
        print(f"told after {told_s:.1f} s, replaced after {time.monotonic() - started_s:.1f} s")
        assert once.exists()
        assert told_s < 20  # 10 s until it is noticed, and a try elsewhere
    finally:
        serve.delete("hung")
