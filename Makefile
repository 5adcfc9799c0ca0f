# What a newcomer types. Everything runs in .venv; nothing outside the checkout is touched but
# the model cache. PIP_ARGS reaches pip, e.g. to name an index with CPU builds of torch.
PYTHON   ?= python3
PIP_ARGS ?=
BIN      := .venv/bin
CORE     := .venv/.installed
DEV      := .venv/.installed-dev
BENCH    := .venv/.installed-bench
VLLM     := .venv/.installed-vllm

.PHONY: help quickstart quickstart-vllm install install-vllm install-browser test test-slow test-vllm test-browser check lint-docker bench bench-vllm clean

help:
	@echo "make quickstart   install, fetch a 15 M-parameter model, align it (minutes, 2 cores)"
	@echo "make test         install, run the everyday tests      make test-slow   the others"
	@echo "make check        lint, formatting, types              make bench       benchmarks"
	@echo "make install-vllm vLLM, for this CPU or GPU            make test-vllm   its tests"
	@echo "make install-browser   Chromium, by apt-get        make test-browser   tests of the page"
	@echo "make quickstart-vllm   the quickstart with two vLLM generators"

quickstart: $(CORE)
	$(BIN)/freshpairs fetch stories15m
	$(BIN)/freshpairs train configs/quickstart.yaml run.name=quickstart-$$(date +%Y%m%d-%H%M%S)

quickstart-vllm: $(VLLM)
	$(BIN)/freshpairs fetch stories15m
	$(BIN)/freshpairs train configs/quickstart-vllm.yaml run.name=quickstart-vllm-$$(date +%Y%m%d-%H%M%S)

install: $(CORE)

install-vllm: $(VLLM)

install-browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
	  echo "install Chromium and its chromedriver, so that both are on the PATH" >&2; exit 1; fi; \
	if [ "$$(id -u)" = 0 ]; then as_root=; elif command -v sudo >/dev/null; then as_root=sudo; else \
	  echo "as root: apt-get install chromium chromium-driver" >&2; exit 1; fi; \
	$$as_root apt-get update -qq && \
	$$as_root env DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -qq --no-install-recommends chromium chromium-driver

test: $(DEV)
	$(BIN)/pytest -q -m "not slow and not vllm and not browser"

test-slow: $(DEV)
	$(BIN)/pytest -q -m "slow and not vllm and not browser"

test-vllm: $(DEV) $(VLLM)
	$(BIN)/pytest -q -m "vllm and not browser"

test-browser: $(DEV) install-browser
	$(BIN)/pytest -q -m browser

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint-docker: $(DEV)
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/shellcheck docker/*.sh .ci/run
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose*.yaml
	$(BIN)/kubernetes-validate --strict docker/kuberay/runs.yaml

bench: $(BENCH)
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/objectives.py
	$(BIN)/python benchmarks/weight_sync.py

bench-vllm: $(VLLM)
	$(BIN)/python benchmarks/generate.py

$(CORE): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(PIP_ARGS) --editable .
	@touch $@

$(DEV): $(CORE) pyproject.toml
	$(BIN)/pip install --quiet $(PIP_ARGS) --editable ".[dev]"
	@touch $@

$(VLLM): $(CORE) pyproject.toml
	$(BIN)/python docker/install_vllm.py $(PIP_ARGS)
	@touch $@

$(BENCH): $(CORE) pyproject.toml
	$(BIN)/pip install --quiet $(PIP_ARGS) --editable ".[bench]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
