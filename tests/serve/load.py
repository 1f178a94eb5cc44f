"""A steady load of single predictions, of which everything is recorded."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx2
import pytest

TIMEOUT_S = 30.0
# Rows of a batch change each other by rounding.
_NEAR = 1e-4

# (task, text) -> the probability of each label, as PEFT has it.
Wanted = Mapping[tuple[str, str], list[float]]


class Sent(NamedTuple):
    """A request and what came of it.

    Attributes:
        due_s: When it was to be sent, by `time.monotonic`.
        took_s: From then until it was answered, or failed.
        status: Of the answer; 0 if none came.
        said: Why it failed, "" if it did not.
    """

    due_s: float
    took_s: float
    status: int
    said: str


class Steady:
    """Sends one text a request, so many times a second whatever the answers do, until left."""

    def __init__(self, url: str, wanted: Wanted, rate: float) -> None:
        self._url, self._wanted, self._rate = url, wanted, rate
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.sent: list[Sent] = []

    def __enter__(self) -> Steady:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        self._thread.join()

    @property
    def failed(self) -> list[Sent]:
        return [one for one in self.sent if one.said]

    def percentile(self, percent: float, since_s: float = 0.0) -> float:
        """The time in s that so many percent of the requests did not exceed."""
        ordered = sorted(one.took_s for one in self.sent if one.due_s >= since_s)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]

    def told(self, since_s: float = 0.0) -> str:
        """What came of the requests, in a line."""
        since = [one for one in self.sent if one.due_s >= since_s]
        failed = [one for one in since if one.said]
        line = (
            f"{len(since)} requests, {len(failed)} failed, p50 {self.percentile(50, since_s):.3f} "
            f"p99 {self.percentile(99, since_s):.3f} most {self.percentile(100, since_s):.3f} s"
        )
        if failed:
            span_s = max(one.due_s + one.took_s for one in failed) - failed[0].due_s
            line += f"; failed within {span_s:.1f} s: {sorted({one.said for one in failed})}"
        return line

    async def _run(self) -> None:
        # Connections that are kept are what a server's death cuts; a client that retries hides it.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=32)
        async with httpx2.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:
            due_s = time.monotonic()
            async with asyncio.TaskGroup() as sending:
                for asked in itertools.cycle(self._wanted):
                    if self._ending.is_set():
                        return
                    sending.create_task(self._send(client, due_s, *asked))
                    due_s += 1 / self._rate
                    await asyncio.sleep(max(0.0, due_s - time.monotonic()))

    async def _send(self, client: httpx2.AsyncClient, due_s: float, task: str, text: str) -> None:
        status, said = 0, ""
        try:
            response = await client.post(
                f"{self._url}/v1/tasks/{task}/predict",
                json={"texts": [text], "return_scores": True},
            )
            status = response.status_code
            if status != 200:
                said = f"{status} {response.text[:200]}"
            elif not self._is_right(task, text, response.json()):
                said = f"wrong: {response.text[:200]}"
        except httpx2.TransportError as error:
            said = repr(error)
        self.sent.append(Sent(due_s, time.monotonic() - due_s, status, said))

    def _is_right(self, task: str, text: str, answer: dict[str, Any]) -> bool:
        (result,) = answer["results"]
        got = list(result.get("probabilities", {}).values())
        return got == pytest.approx(self._wanted[task, text], abs=_NEAR)
