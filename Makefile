# Every verb a user or CI needs. `make help` lists them.
PYTHON ?= python3.11
TORCH ?= torch==2.13.0
PINNED_TORCH := torch==2.5.1
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help venv smoke bench test test-slow test-harness test-gpu test-distributed test-pinned lint clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-17s %s\n", $$1, $$2}'

# Asked for another Python or torch, what is there is no use.
CHOICE := $(PYTHON) $(TORCH)
ifneq ($(shell cat $(VENV)/.choice 2>/dev/null),$(CHOICE))
.PHONY: $(VENV)/.installed
endif

# torch comes first and pinned, so that the range in pyproject.toml installs nothing newer.
$(VENV)/.installed: pyproject.toml
	test "$$(cat $(VENV)/.choice 2>/dev/null)" = "$(CHOICE)" || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	echo "$(CHOICE)" > $(VENV)/.choice
	touch $@

venv: $(VENV)/.installed  ## create .venv with the package and its test and lint tools

smoke: venv  ## train our submission and the baseline on the smoke workloads, print scores, write plots
	$(BIN)/python -m workloads_smoke.smoke

bench: venv  ## print the benchmark tables (operations, bytes, times) and write them to results/bench
	$(BIN)/python -m benchmarks

test: venv  ## run the default test suite
	$(BIN)/python -m pytest

test-slow: venv  ## run the checks that take minutes
	$(BIN)/python -m pytest -m slow

test-harness: venv  ## run the checks that need the official harness (skipped, loudly, without it)
	$(BIN)/python -m pytest -m harness -rs

test-gpu: venv  ## run the checks that need a GPU (skipped, loudly, without one)
	$(BIN)/python -m pytest -m gpu -rs

# Many processes on few cores: one file after the other, and patience.
test-distributed: venv  ## run all tests of several processes, 1 to 8 of them
	$(BIN)/python -m pytest -n 0 -m "slow or not slow" tests/test_assignment.py tests/test_division.py \
		tests/test_distributed_*.py tests/test_submission_distributed.py

# A second environment; several GB where only the CUDA build of the pinned torch is to be had.
.venv-pinned/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-pinned
	.venv-pinned/bin/pip install --quiet "$(PINNED_TORCH)"
	.venv-pinned/bin/pip install --quiet --editable ".[dev]"
	touch $@

test-pinned: .venv-pinned/.installed  ## run the suite on the benchmark's pinned torch
	.venv-pinned/bin/python -m pytest

lint: venv  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove what the targets above made, but not results
	rm -rf $(VENV) .venv-pinned build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
