# Two commands for newcomers: `make train` and `make test`. VENV and PYTHON may be set on the command line.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# one thread a process: pytest runs two processes, and bits depend on the thread count
export OMP_NUM_THREADS ?= 1

# what `make gpu` tests: the newest wheel of dist/, else the checkout; GPU_SITE: a folder with further packages
GPU_WHEEL ?= $(lastword $(sort $(wildcard dist/stabletrain-*.whl)))
GPU_SITE ?=
GPU_JOBS ?= 4

.PHONY: help train test test-all lint bench generate gpu

help:
	@echo "make train      train the default recipe (char_gpt) and log it to MLflow"
	@echo "make test       the quick tests, under 10 minutes on 2 cores"
	@echo "make test-all   lint, types, quick and slow tests: what CI runs"
	@echo "make lint       ruff and mypy"
	@echo "make bench      the overhead table"
	@echo "make gpu        tests and benchmark of a GPU, at most 6 minutes; needs torch, Lightning and pytest, no network"
	@echo "make generate   write the generated parts again (export table, catalogue)"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

train: $(VENV)/installed
	$(BIN)/stabletrain train char_gpt

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2

# three at a time on two cores: a third of the slow tests' time is waiting for time limits and for processes that end
test-all: lint test
	$(BIN)/python -m pytest -m slow -n 3 --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/start.py

generate: $(VENV)/installed
	$(BIN)/python tools/generate.py

# without an environment of its own and without a network: PYTHON is the machine's, which has torch and Lightning
gpu:
	PYTHON="$(PYTHON)" WHEEL="$(GPU_WHEEL)" SITE="$(GPU_SITE)" JOBS="$(GPU_JOBS)" sh tools/gpu.sh
