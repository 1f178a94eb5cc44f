# `make serve` on a machine with nothing but python3, make and a network goes all the way to a
# running server: it builds .venv from the hash-pinned requirements.lock first, once.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp
BENCH_STAMP := .venv/.stamp-bench
# uv installs in parallel and from a cache. Without one on PATH, the lock's own is used.
UV := $(or $(shell command -v uv 2>/dev/null),$(BIN)/uv)
# uv trusts a list of its own; behind a proxy with its own authority only the machine's list is right.
ifneq ($(wildcard /etc/ssl/certs/ca-certificates.crt),)
export UV_SYSTEM_CERTS ?= 1
endif

.PHONY: help setup serve test test-all test-lowest check bench bench-gpu train readme lock clean
# A venv that failed half-way (Debian without python3-venv) must not look like one.
.DELETE_ON_ERROR:

help:  ## Print this list (the default)
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP)  ## Build .venv and examples/base, if they are not up to date

serve: setup  ## Serve serve_config.yaml until Ctrl-C
# HAProxy and throughput mode: Serve's default proxy costs more than the model does.
# Token: replicas unpickle what reaches their ports, so nobody else may.
# Health: HAProxy, if it dies, is replaced in 8 s instead of 29.
# Draining: without the 0, replacing an ingress replica takes 30 s.
	RAY_SERVE_ENABLE_HA_PROXY=1 \
	RAY_SERVE_THROUGHPUT_OPTIMIZED=1 \
	RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=2 \
	RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=0 \
	RAY_AUTH_MODE=token \
	RAY_USAGE_STATS_ENABLED=0 \
	exec $(BIN)/python -m deployments serve_config.yaml

test: setup  ## Run the tests, but for those marked slow
	$(BIN)/python -m pytest

test-all: setup  ## Run all tests
	$(BIN)/python -m pytest -m ""

# The oldest of every package that pyproject.toml allows, for the engine: what a GPU image may have.
test-lowest: setup  ## Run the tests of engine and adapters on the oldest packages allowed
	$(PYTHON) -m venv --clear .venv-lowest
	$(UV) pip install --python .venv-lowest/bin/python --resolution lowest-direct --quiet \
	    -r pyproject.toml --group dev
	.venv-lowest/bin/python -m pytest -p no:cacheprovider tests/adapters tests/model

check: setup  ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup $(BENCH_STAMP)  ## Answer all questions of benchmarks/ anew, and write the docs
	$(BIN)/python -m benchmarks
	$(BIN)/python docs/readme.py

bench-gpu: setup  ## Measure on one GPU, in minutes: our batches, the plain base, PEFT, memory
	$(BIN)/python -m benchmarks.gpu

train: setup  ## Train the example adapters anew
	$(BIN)/python examples/train.py

readme: setup  ## Write the numbers in README.md and docs/benchmarks.md anew
	$(BIN)/python docs/readme.py

# Keeps the versions that are locked already: `make lock UPGRADE=--upgrade` takes the newest.
# No index address goes into the file, so it installs from any mirror.
COMPILE = $(UV) pip compile --universal --python-version 3.11 --generate-hashes \
    --no-emit-index-url --custom-compile-command "make lock" --quiet $(UPGRADE)
lock: | $(UV)  ## Write both requirements.lock from pyproject.toml
	$(COMPILE) pyproject.toml --group dev --output-file requirements.lock
	$(COMPILE) --group bench --constraints requirements.lock \
	    --output-file benchmarks/requirements.lock

clean:  ## Remove caches and examples/base; .venv stays and is checked again by the next make
	rm -rf $(STAMP) $(BENCH_STAMP) examples/base .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# --python: a venv that happens to be active is not ours.
# Bytecode: otherwise each of Ray's processes compiles torch and transformers at its first import,
# and where PYTHONDONTWRITEBYTECODE is set at every one.
$(STAMP): requirements.lock examples/base.lock examples/base.py clients/pyproject.toml | $(BIN)/python $(UV)
	$(UV) pip install --python $(BIN)/python --require-hashes --compile-bytecode -r requirements.lock
	$(UV) pip install --python $(BIN)/python --require-hashes --no-deps -r examples/base.lock
	$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation -e clients
	$(BIN)/python examples/base.py
	@touch $@

# Only what draws, and peers: the tests need none of it.
$(BENCH_STAMP): benchmarks/requirements.lock $(STAMP) | $(UV)
	$(UV) pip install --python $(BIN)/python --require-hashes --compile-bytecode \
	    -r benchmarks/requirements.lock
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "onebase needs\
	 Python 3.11 or newer, and $(PYTHON) is not: name one with 'make PYTHON=python3.11'." >&2; exit 1; }
	$(PYTHON) -m venv .venv

$(BIN)/uv: | $(BIN)/python
	sed -n '/^uv==/,/# via/p' requirements.lock | \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --no-deps --require-hashes -r /dev/stdin
