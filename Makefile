# What a newcomer types. Everything runs in .venv; nothing outside the checkout is touched but
# the model cache. PIP_ARGS reaches pip, e.g. to name an index with CPU builds of torch.
PYTHON   ?= python3
PIP_ARGS ?=
BIN      := .venv/bin
CORE     := .venv/.installed
DEV      := .venv/.installed-dev
BENCH    := .venv/.installed-bench

.PHONY: help quickstart install test test-slow check bench clean

help:
	@echo "make quickstart   install, fetch a 15 M-parameter model, align it (minutes, 2 cores)"
	@echo "make test         install, run the everyday tests      make test-slow   the others"
	@echo "make check        lint, formatting, types              make bench       benchmarks"

quickstart: $(CORE)
	$(BIN)/freshpairs fetch stories15m
	$(BIN)/freshpairs train configs/quickstart.yaml run.name=quickstart-$$(date +%Y%m%d-%H%M%S)

install: $(CORE)

test: $(DEV)
	$(BIN)/pytest -q -m "not slow"

test-slow: $(DEV)
	$(BIN)/pytest -q -m slow

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(BENCH)
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/objectives.py

$(CORE): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(PIP_ARGS) --editable .
	@touch $@

$(DEV): $(CORE) pyproject.toml
	$(BIN)/pip install --quiet $(PIP_ARGS) --editable ".[dev]"
	@touch $@

$(BENCH): $(CORE) pyproject.toml
	$(BIN)/pip install --quiet $(PIP_ARGS) --editable ".[bench]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
