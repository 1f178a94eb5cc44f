"""One module, one question; `python -m benchmarks` asks them all."""
