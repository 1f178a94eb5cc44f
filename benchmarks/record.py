"""What was measured, one JSON line a measurement, and the table that people read."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def setup(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that a number depends on and that can be found out."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", *packages)},
    }


def _commit() -> str:
    """Return the commit, with a + if what was measured is not what was committed."""

    def git(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)

    written = (":!benchmarks/results", ":!*.md")
    changed = git("status", "--porcelain", "--", ".", *written).stdout
    return git("rev-parse", "--short", "HEAD").stdout.strip() + ("+" if changed else "")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def save(question: str, rows: Sequence[Mapping[str, Any]], said: Mapping[str, Any]) -> None:
    """Write results/{question}.jsonl, in every line the setup from before it was measured."""
    RESULTS.mkdir(exist_ok=True)
    common = {"question": question, "setup": said}
    lines = [json.dumps({**common, **_rounded(row)}) for row in rows]
    (RESULTS / f"{question}.jsonl").write_text("\n".join(lines) + "\n")


def read(question: str) -> list[dict[str, Any]]:
    """Return the rows that were saved, none if the question was never answered."""
    path = RESULTS / f"{question}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def save_table(question: str, text: str) -> str:
    """Write results/{question}.md, and return its text."""
    (RESULTS / f"{question}.md").write_text(text + "\n")
    return text


def _rounded(value: Any) -> Any:
    """Return the same with five digits a number: no clock has more."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
