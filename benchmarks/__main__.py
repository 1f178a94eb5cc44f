"""`python -m benchmarks [question …]`: answer all questions, or those named."""

import importlib
import sys

from transformers.utils import logging

logging.set_verbosity_error()  # that a head is new is what is meant
logging.disable_progress_bar()
QUESTIONS = ("mixing", "cliff", "many", "threads")

for question in sys.argv[1:] or QUESTIONS:
    if question not in QUESTIONS:
        sys.exit(f"{question!r} is not one of {', '.join(QUESTIONS)}")
    importlib.import_module(f"benchmarks.{question}").main()
