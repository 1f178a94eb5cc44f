"""Rows go to the model over a connection, and by Serve's calls while there is none."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx2
import pytest

from deployments.rows import Parcel, Reply

REQUESTS = 40


@pytest.fixture(scope="module")
def counted(cluster: str, example_args: Any) -> Iterator[tuple[str, Any]]:
    """An application whose model counts Serve's calls; yields where to predict, and its model."""
    from ray import serve

    from benchmarks.noop.hop import NoForward
    from deployments import app

    class Counted(NoForward):
        by_serve = 0

        async def exchange(
            self,
            replica: str,
            ingress: str,
            heard: int,
            parcels: Sequence[Parcel],
            gone: Sequence[int],
        ) -> Reply:
            self.by_serve += 1
            return await super().exchange(replica, ingress, heard, parcels, gone)

        async def num_by_serve(self) -> int:
            return self.by_serve

        async def num_connected(self) -> int:
            return len(self._listener._calls)

        async def hang_up(self) -> None:
            """Be nowhere to be reached but by Serve, until `listen`."""
            self._here, self._listener.address = self._listener.address, None
            for frames in [*self._listener._calls]:
                frames.close()

        async def listen(self) -> None:
            self._listener.address = self._here

        async def note_its_end(self, file: Path) -> None:
            """Make a file when the listener has closed."""
            close = self._listener.close

            async def closed() -> None:
                await close()
                file.touch()

            self.__del__ = closed

    with patch.object(app, "Model", Counted):
        serve.run(app.build(example_args), name="counted", route_prefix="/counted")
    yield (
        f"{cluster}/counted/v1/tasks/spam/predict",
        serve.get_deployment_handle("Model", "counted"),
    )
    serve.delete("counted")


def count(model: Any, method: str) -> int:
    told: int = getattr(model, method).remote().result(timeout_s=30)
    return told


def predict(url: str) -> None:
    response = httpx2.post(url, json={"texts": ["Is it there?"]}, timeout=30)
    assert response.status_code == 200, response.text


def wait_until(happened: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < until_s
        time.sleep(0.1)


def connected(url: str, model: Any) -> bool:
    predict(url)  # where there is no connection, this has one made
    return count(model, "num_connected") == 1


def test_rows_go_over_a_connection_once_there_is_one(counted: tuple[str, Any]) -> None:
    url, model = counted
    wait_until(lambda: connected(url, model))
    by_serve, answered = count(model, "num_by_serve"), count(model, "num_answered")
    for _ in range(REQUESTS):
        predict(url)
    assert count(model, "num_answered") == answered + REQUESTS
    assert count(model, "num_by_serve") == by_serve
    assert count(model, "num_connected") == 1


def test_rows_go_by_serve_s_calls_where_there_is_no_connection(counted: tuple[str, Any]) -> None:
    url, model = counted
    wait_until(lambda: connected(url, model))
    model.hang_up.remote().result(timeout_s=30)
    by_serve, answered = count(model, "num_by_serve"), count(model, "num_answered")
    for _ in range(REQUESTS):
        predict(url)
    assert count(model, "num_connected") == 0
    assert count(model, "num_answered") == answered + REQUESTS
    assert count(model, "num_by_serve") >= by_serve + REQUESTS
    model.listen.remote().result(timeout_s=30)
    wait_until(lambda: connected(url, model))


def test_a_replica_that_stops_waits_for_its_callers(
    counted: tuple[str, Any], tmp_path: Path
) -> None:
    """That Serve awaits what the object, not its class, has as `__del__`. Comes last."""
    from ray import serve

    _, model = counted
    model.note_its_end.remote(tmp_path / "ended").result(timeout_s=30)
    serve.delete("counted")
    wait_until((tmp_path / "ended").exists)
