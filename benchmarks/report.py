"""What documents say of the answers, from what was saved. Needs no matplotlib."""

from __future__ import annotations

import inspect
from typing import Any

from benchmarks import QUESTIONS, question
from benchmarks.record import RESULTS, read

HEAD = """# Benchmarks

Each question is a module of `benchmarks/`, and `make bench` answers all of them anew. Times are
medians of runs taken in turns (A B C A B C …), and ratios are of the same round, so what slows the
machine for a while slows both sides. Written by `docs/readme.py` from `benchmarks/results/`.
"""


def sentences() -> str:
    """Return README's list: a line each question that was answered and has something short."""
    answered = [(question(name), read(name)) for name in QUESTIONS if read(name)]
    machines = sorted({_machine(rows[0]["setup"]) for _, rows in answered})
    lines = [module.in_short(rows) for module, rows in answered]
    listed = "".join(f"- {line}\n" for line in lines if line)
    return f"\nMeasured on {'; '.join(machines)}:\n\n{listed}"


def document() -> str:
    """Return docs/benchmarks.md: every question that was answered, its table, plot and setup."""
    return "\n".join([HEAD, *(section(name) for name in QUESTIONS if read(name))])


def section(name: str) -> str:
    asked, mark, how = inspect.cleandoc(question(name).__doc__ or "").partition("?")
    rows = read(name)
    parts = [
        f"## {asked}{mark}",
        how.strip(),
        question(name).as_table(rows),
        f"![{asked}{mark}](../{RESULTS.parent.name}/{RESULTS.name}/{name}.svg)"
        if (RESULTS / f"{name}.svg").exists()
        else "",
        f"<sub>{setup_line(rows[0]['setup'])}</sub>",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def setup_line(setup: dict[str, Any]) -> str:
    """Return the machine, the versions, the commit and the date in one line."""
    said = ("cpu", "cores", "threads", "device", "commit", "date")
    versions = ", ".join(f"{name} {value}" for name, value in setup.items() if name not in said)
    threads = f"{setup['threads']} threads"
    commit = f"commit {setup['commit']}, {setup['date']}"
    return "; ".join([f"{_machine(setup)}, {threads}", versions, commit])


def _machine(setup: dict[str, Any]) -> str:
    device = "" if setup["device"] == "cpu" else f"{setup['device']}, "
    return f"{device}{setup['cpu']}, {setup['cores']} cores"
