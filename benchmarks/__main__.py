"""`python -m benchmarks [question …]`: answer all questions, or those named.

Each in a process of its own: the memory and threads of one would colour the next.
"""

import os
import subprocess
import sys

from transformers.utils import logging

from benchmarks import QUESTIONS, question
from benchmarks.plot import save_plot  # says at once that matplotlib is missing
from benchmarks.record import read, save, save_table, setup
from deployments.model.allocator import CPU_MEMORY


def answer(name: str) -> None:
    """Measure one question; save what was found, and show it."""
    logging.set_verbosity_error()  # that a head is new is what is meant
    logging.disable_progress_bar()
    said, found = setup(getattr(question(name), "PACKAGES", ())), []
    for row in question(name).measure():
        print(row, file=sys.stderr, flush=True)
        found.append(row)
    save(name, found, said)
    show(name)


def show(name: str) -> None:
    """Write a question's table and plot from what was saved."""
    rows = read(name)
    print(save_table(name, question(name).as_table(rows)), flush=True)
    save_plot(name, rows)


def main(names: list[str]) -> None:
    """Answer the questions; exit with a sentence if one is unknown or fails."""
    for name in names:
        if name not in QUESTIONS:
            sys.exit(f"{name!r} is not one of {', '.join(QUESTIONS)}")
    if len(names) == 1:
        answer(names[0])
        return
    failed = []
    for name in names or QUESTIONS:
        print(f"== {name}", file=sys.stderr, flush=True)
        if subprocess.run([sys.executable, "-m", "benchmarks", name]).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"not answered: {', '.join(failed)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--show"]:
        for given in sys.argv[2:] or QUESTIONS:
            show(given)
    elif not os.environ.items() >= CPU_MEMORY.items():  # as the model's replicas are started
        again = [sys.executable, "-m", "benchmarks", *sys.argv[1:]]
        os.execve(sys.executable, again, os.environ | CPU_MEMORY)
    else:
        main(sys.argv[1:])
