"""What `benchmarks.serving` loads: how each is started, and what it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import traffic
from benchmarks.record import ROOT
from benchmarks.servers import FAST, config
from benchmarks.serving_told import GUIDE, IDIOM, IDIOM_FAST, OURS, OURS_INT8

BASE = str(ROOT / "examples" / "base")


@dataclass(frozen=True)
class System:
    """What is loaded: how it is started on a port, and what it is asked."""

    command: Callable[[Path, int], Sequence[str]]
    requests: Callable[[], Iterator[bytes]]
    environment: dict[str, str]


def systems(pairs: Sequence[tuple[str, str]]) -> dict[str, System]:
    """By name, the guide's first."""
    peers = ["-m", "benchmarks.peers.ray_idiom", BASE]

    def guide(folder: Path, port: int) -> list[str]:
        adapter = str(folder / "tasks" / "sentiment")
        return ["-m", "benchmarks.peers.guide", BASE, adapter, str(port)]

    def idiom(folder: Path, port: int) -> list[str]:
        return [*peers, str(folder / "two-labels"), str(port)]

    def ours(quantization: str) -> Callable[[Path, int], list[str]]:
        return lambda folder, port: command_of_ours(folder, port, quantization)

    return {
        GUIDE: System(guide, lambda: traffic.guide(pairs), {}),
        IDIOM: System(idiom, lambda: traffic.idiom(pairs), {}),
        IDIOM_FAST: System(idiom, lambda: traffic.idiom(pairs), FAST),
        OURS: System(ours("none"), lambda: traffic.ours(pairs), FAST),
        OURS_INT8: System(ours("int8"), lambda: traffic.ours(pairs), FAST),
    }


def command_of_ours(folder: Path, port: int, quantization: str, store: str = "tasks") -> list[str]:
    return ["-m", "deployments", config(folder, port, [application(folder / store, quantization)])]


def application(
    store: Path, quantization: str, builder: str = "deployments.app", at: str = ""
) -> Any:
    return {
        "name": at.strip("/") or "onebase",
        "route_prefix": at or "/",
        "import_path": f"{builder}:build",
        "args": {
            "base_model": BASE,
            "adapter_store": str(store),
            "quantization": quantization,
            "device": "cpu",
        },
    }
