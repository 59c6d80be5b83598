# Two commands do everything, set-up included: `make train` and `make test`.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RECIPE ?= recipes/tiny.yaml
# More settings for `make train`, for example: make train ARGS="steps=10 seed=1 run_dir=runs/seed1"
ARGS ?=

# The models of this project's CPU runs are so small that a second thread costs more than it gives.
export OMP_NUM_THREADS ?= 1

.PHONY: setup train test lint layouts doctor clean

setup: $(INSTALLED)

# torch comes first: a CPU build of exactly this version, where there is one, keeps gigabytes of CUDA packages away.
$(INSTALLED): pyproject.toml
	$(shell command -v $(PYTHON) || command -v python3) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .[dev]
	touch $@

train: $(INSTALLED)
	$(BIN)/python tools/make_tiny_base.py --out artifacts/tiny
	$(BIN)/megatron-vapo train $(RECIPE) $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not gpu"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Every parallel layout against one process and against plain PyTorch; writes docs/layouts.md.
layouts: $(INSTALLED)
	$(BIN)/python -m benchmarks.layouts --write docs/layouts.md

doctor: $(INSTALLED)
	$(BIN)/megatron-vapo doctor

clean:
	rm -rf $(VENV) artifacts runs .pytest_cache .ruff_cache .hypothesis *.egg-info
