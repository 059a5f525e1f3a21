# Every target does its own set-up. The environment is made once and again when its inputs change.

PYTHON ?= python3
# A configuration file and overrides, as in: make train CONFIG="my.toml --train.steps 50"
CONFIG ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
ROOMS := comm fp8 launch model parallel predict

.PHONY: help venv train test check bench gpu

help:
	@echo "make venv    set up $(VENV)"
	@echo "make train   train the default model; CONFIG=\"FILE.toml --key VALUE\" for another run"
	@echo "make test    check, then run the tests"
	@echo "make check   lint, format and types"
	@echo "make bench   the benchmarks, results in bench/results"
	@echo "make gpu     tests and benchmark on this machine's GPU, with the python3 that is there"

venv: $(STAMP)

# setuptools comes first and pinned, and builds without isolation: the test of the wheel builds so too.
# The links show the rooms to pyright as the subpackages of counterflow that they are once installed.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[test,plots]'
	mkdir -p $(VENV)/typing/counterflow
	for name in $(ROOMS); do ln -sfn ../../../$$name $(VENV)/typing/counterflow/$$name; done
	for name in __init__.py py.typed; do \
		ln -sfn ../../../counterflow/$$name $(VENV)/typing/counterflow/$$name; done
	touch $(STAMP)

train: $(STAMP)
	$(BIN)/counterflow train $(CONFIG)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Two tests at a time, since most wait much; tests/beside.py says which.
test: check
	$(BIN)/python -m pytest -n 2

# bench.fp8_training takes an hour on two cores and is run by itself.
bench: $(STAMP)
	$(BIN)/python -m bench.pipeline
	$(BIN)/python -m bench.simulate
	$(BIN)/python -m bench.dispatch
	$(BIN)/python -m bench.activation_memory
	$(BIN)/python -m bench.overlap
	$(BIN)/python -m bench.checkpoint
	$(BIN)/python -m bench.zero
	$(BIN)/python -m bench.survival
	$(BIN)/python -m bench.all_ranks
	$(BIN)/python -m bench.search
	$(BIN)/python -m bench.predict

# A GPU machine brings its own torch, matched to its driver, and may have no network.
gpu:
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
	$(PYTHON) -m pytest tests/gpu
	$(PYTHON) -m bench.gpu
	$(PYTHON) -m bench.activation_memory
	$(PYTHON) -m bench.fp8_training --device cuda --scale 4 --batch 64 --steps 1000 --jobs 1
	$(PYTHON) -m bench.fp8_kernels
