"""`python -m benchmarks [question …]`: answer all questions, or those named."""

import importlib
import os
import sys

from transformers.utils import logging

from deployments.model.allocator import KEEP_FREED_MEMORY

logging.set_verbosity_error()  # that a head is new is what is meant
logging.disable_progress_bar()
QUESTIONS = ("mixing", "int8")

if not os.environ.items() >= KEEP_FREED_MEMORY.items():  # as the model's replicas are started
    again = [sys.executable, "-m", "benchmarks", *sys.argv[1:]]
    os.execve(sys.executable, again, os.environ | KEEP_FREED_MEMORY)

for question in sys.argv[1:] or QUESTIONS:
    if question not in QUESTIONS:
        sys.exit(f"{question!r} is not one of {', '.join(QUESTIONS)}")
    importlib.import_module(f"benchmarks.{question}").main()
