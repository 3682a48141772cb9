# One command is enough in a fresh checkout: each target first makes .venv if it is
# not there yet. `make help` says what there is.
#
#   PYTHON=python3.12   the interpreter .venv is made from
#   CXX=clang++         the compiler torch uses when a program runs

VENV := .venv
PY := $(VENV)/bin/python
# Once made, .venv is kept up by the interpreter it was made from.
PYTHON ?= $(firstword $(wildcard $(PY)) python3)

# make has a CXX of its own that need not exist; torch on Linux looks for g++ alone.
ifeq ($(origin CXX),default)
  CXX := $(shell command -v g++ >/dev/null || ! command -v clang++ >/dev/null \
           && echo g++ || echo clang++)
endif
export CXX

# Once .venv stands nothing here needs the network: what tries it fails at once.
HF_HUB_OFFLINE ?= 1
export HF_HUB_OFFLINE

PIP := $(PY) -m pip --disable-pip-version-check install --quiet -c constraints.txt
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-full bench bench-gpu bench-rows bench-moe coverage-models frontier peers lint types format

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## run the example pipeline with and without caching
	$(PY) -m examples.shapes.demo

test: lint types ## what a change must pass: lint, types, imports, the quick tests
	$(PY) -m pytest -n 2 -m "not full"

test-full: $(READY) ## every test, with the large compiled matrices
	$(PY) -m pytest -n 2

bench: $(READY) ## measure speed and quality
	$(PY) -m benchmarks.bench

bench-gpu: $(READY) ## measure a real model's calls, where there is a GPU: some minutes
	$(PY) -m benchmarks.gpu

bench-rows: $(READY) ## measure decisions for each row and continuous batching: half an hour
	$(PY) -m benchmarks.rows

bench-moe: $(READY) ## measure routed experts as one operation, on a GPU too where there is one
	$(PY) -m benchmarks.moe

coverage-models: $(READY) ## check all transformers of diffusers, write docs/models.md: half an hour
	$(PY) -m benchmarks.coverage

frontier: $(READY) ## measure every policy over a range of its main knob: about an hour
	$(PY) -m benchmarks.frontier

# Not part of the set-up: nothing else needs the peers.
peers: $(READY) ## compare with other libraries that cache: some hours
	@$(PIP) "$(TORCH)" -e ".[diffusers,peers]"
	$(PY) -m benchmarks.peers

lint: $(READY) ## style, format and the import contracts
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo

types: $(READY) ## mypy, strict
	$(PY) -m mypy

format: $(READY) ## rewrite the sources in the house style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# A file as the stamp, so that an interrupted set-up is taken up again and a finished
# one is left alone until what it was made from changes.
#
# torch comes first and by its exact version. Left to the second command, pip may
# look at newer ones on its way, and these are gigabytes of CUDA libraries each.
$(READY): pyproject.toml constraints.txt
	@.ci/check-machine "$(PYTHON)" "$(CXX)"
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  echo "Making $(VENV) with $$($(PYTHON) -V) ..."; $(PYTHON) -m venv $(VENV); }
	@echo "Installing $(TORCH) (200 MB for the CPU build; one to five minutes) ..."
	@$(PIP) "$(TORCH)" || { \
	  echo "pip could not install $(TORCH); its words are above. pip looks where its own"; \
	  echo "settings say (pip config list): the set-up needs an index or a folder there."; \
	  exit 1; }
	@echo "Installing cachepass, diffusers and the tools (about a minute) ..."
	@$(PIP) -e ".[diffusers,onnx,dev]"
	@touch $@
