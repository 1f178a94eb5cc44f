"""What waits for what, told by stand-ins for streams; tests/gpu has real ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from deployments.model.copies import Copies


def test_on_a_cpu_nothing_is_waited_for() -> None:
    copies = Copies(torch.device("cpu"))
    with copies.of(1):
        pass
    copies.wait([1, 2])
    assert copies._running == {}


class Stream:
    """A stream that writes down what it waits for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} event")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


def test_a_forward_waits_for_the_copies_of_its_own_slots_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    current = [Stream("main", log)]

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("side", log))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[-1])
    copies = Copies(torch.device("cuda"))
    for slot in (1, 2):
        with copies.of(slot):
            log.append(f"copy on {current[-1].name}")
    assert log == ["side waits for main", "copy on side", "side event"] * 2
    log.clear()
    copies.wait([3])
    assert log == []
    copies.wait([1, 1, 3])
    copies.wait([1])
    assert log == ["main waits for event of side"]
