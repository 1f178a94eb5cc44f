"""A model replica that can answer no more: its callers are told, and it is replaced."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]


# With how many seconds it takes to be noticed. Of a forward nobody knows before that it hangs.
@pytest.mark.parametrize(
    ("fault", "noticed_s"),
    [
        ("hangs", 10.0),
        pytest.param("NaN", 1.0, marks=pytest.mark.slow),
        pytest.param("no loop", 1.0, marks=pytest.mark.slow),
    ],
)
def test_a_replica_that_can_answer_no_more_is_noticed_and_replaced(
    cluster: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    noticed_s: float,
) -> None:
    from ray import serve

    import deployments.app
    from deployments.config import Args
    from deployments.model.deployment import Model

    once = tmp_path / "broken"

    class Breaking(Model):
        """The first row of over 20 tokens breaks it; the one that takes its place stays well."""

        async def __init__(self, args: Args) -> None:
            await Model.__init__(self, args)
            real, start = self.engine.predict, self.planner.start

            def breaks(length: int) -> bool:
                if once.exists() or length <= 20:
                    return False
                once.touch()
                return True

            def predict(rows: Any) -> Any:
                import threading

                if fault != "no loop" and breaks(max(row.num_tokens for row in rows)):
                    if fault == "hangs":
                        threading.Event().wait()
                    for parameter in self.engine.encoder.model.base_model.parameters():
                        if parameter.is_floating_point():
                            parameter.data.fill_(float("nan"))
                return real(rows)

            def plan(length: int) -> Any:
                if fault == "no loop" and breaks(length):
                    raise ZeroDivisionError
                return start(length)

            self.engine.predict, self.planner.start = predict, plan

    monkeypatch.setattr(deployments.app, "Model", Breaking)
    store = tmp_path / "store"
    shutil.copytree(ROOT / "examples" / "store", store)
    args = Args(
        base_model=str(ROOT / "examples" / "base"),
        adapter_store=str(store),
        quantization="none",
        device="cpu",
        num_cpus=1,
    )
    serve.run(deployments.app.build(args), name="broken", route_prefix="/broken")
    url = f"{cluster}/broken/v1/tasks/spam/predict"

    def ask(text: str) -> httpx2.Response:
        return httpx2.post(url, json={"text": text}, timeout=60)

    try:
        assert ask("fine").status_code == 200
        (process,) = replicas("broken:Model")
        with ThreadPoolExecutor(2) as callers:
            started_s = time.monotonic()
            asked = [callers.submit(ask, "word " * 40), callers.submit(ask, "word " * 40)]
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                # Serve replaces it after three failed checks, one a second.
                assert time.monotonic() < started_s + noticed_s + 6
                time.sleep(0.05)
            gone_s = time.monotonic() - started_s
            told = [future.result() for future in asked]
        told_s = time.monotonic() - started_s
        while ask("fine").status_code != 200:
            assert time.monotonic() < started_s + 120  # a start is long on busy cores
            time.sleep(0.2)
        print(f"gone after {gone_s:.1f} s, told after {told_s:.1f} s")
        for response in told:  # by the one that took its place, or not at all
            assert response.status_code in (200, 503), response.text
            assert response.status_code == 503 or "error" not in response.json()["results"][0]
        assert told_s < gone_s + 12  # as long as rows wait for another replica
    finally:
        serve.delete("broken")


def replicas(name: str) -> list[psutil.Process]:
    ours = psutil.Process().children(recursive=True)
    return [p for p in ours if f"ServeReplica:{name}" in " ".join(p.cmdline())]
