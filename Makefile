# Two commands do everything, set-up included: `make train` and `make test`.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RECIPE ?= recipes/tiny.yaml
# More settings for `make train`, for example: make train ARGS="steps=10 seed=1 run_dir=runs/seed1"
ARGS ?=
# Options of tools/make_tiny_base.py, for another base than the recipe's; `model.path` and the like then name it.
BASE_ARGS ?=

# Rollout engine of `make train`: transformers (embedded) or sglang (servers in an environment of their own).
ENGINE ?= transformers
SGLANG_VENV ?= .venv-sglang
SGLANG_INSTALLED := $(SGLANG_VENV)/.installed

# A third environment: Python 3.12 with the newer Megatron Core, as GPU nodes have it (docs/install.md).
PYTHON_LATEST ?= python3.12
LATEST_VENV ?= .venv-latest
LATEST_INSTALLED := $(LATEST_VENV)/.installed
# The environment of a GPU node, made by hand.
GPU_PYTHON ?= python
REHEARSAL ?= .gpu-rehearsal
# What proves the core there: models, layouts, weights, checkpoints, resuming, whole runs on 1, 2 and 4 processes. Not when a
# run stops or dies, what it counts, nor what tools print, which are no core's matter.
LATEST_TESTS ?= tests/runtime/test_versions.py tests/models tests/weights/test_convert.py \
	tests/weights/test_convert_layouts.py tests/checkpoint/test_checkpoints.py tests/training/test_resume.py tests/training/test_learning.py \
	tests/distributed/test_torchrun.py tests/crossing \
	$(foreach world,1 2 4,"tests/distributed/test_layouts.py::test_layouts_agree[$(world)]") \
	$(addprefix --deselect=tests/training/test_resume.py::test_,a_stop_in_any_phase a_death_in_any_phase \
	a_run_ahead_repeats_itself rollouts_beside_training rollouts_outlive_a_death a_budget_of_tokens counts_of_failed_rewards) \
	$(addprefix --deselect=tests/weights/test_convert.py::test_,tools_ a_killed_tool) \
	--deselect=tests/distributed/test_torchrun.py::test_a_dead_rank_is_named_and_ends_the_run

# The models of this project's CPU runs are so small that a second thread costs more than it gives.
export OMP_NUM_THREADS ?= 1

# Tests run in two processes where there are two cores; a module, with its servers and models, belongs to one of them.
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || echo 1); echo $$((cores < 2 ? 1 : 2)))
PYTEST := python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

.PHONY: setup sglang-cpu latest train test test-minutes test-fast test-slow test-latest lint layouts doctor gpu-check gpu-rehearsal clean

setup: $(INSTALLED)

# An environment of this package in folder $(1) with interpreter $(2). torch comes first: a CPU build of exactly this
# version, where there is one, keeps gigabytes of CUDA packages away. An environment made by hand, such as a GPU node's
# (docs/install.md), is never installed over.
define install
	@[ ! -e $(1)/pyvenv.cfg ] || [ -e $(1)/.made-by-make ] || [ -e $(1)/.installed ] || { \
		echo "$(1) was not made by make, which would install other versions over it: use its megatron-vapo and python"; \
		echo "directly (docs/install.md), or let make have another folder: make $(MAKECMDGOALS) VENV=.venv-cpu"; exit 1; }
	$(2) -m venv $(1)
	touch $(1)/.made-by-make
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check \
		"torch==2.13.0; python_version < '3.12'" "torch==2.14.1; python_version >= '3.12'"
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --editable .[dev]
	touch $(1)/.installed
endef

$(INSTALLED): pyproject.toml
	$(call install,$(VENV),$(shell command -v $(PYTHON) || command -v python3))

# A second environment, in which an unmodified SGLang serves without a GPU; see tools/sglang_cpu/README.md.
sglang-cpu: $(SGLANG_INSTALLED)

$(SGLANG_INSTALLED): $(shell find tools/sglang_cpu -type f -not -path '*/__pycache__/*')
	bash tools/sglang_cpu/install.sh $(SGLANG_VENV) $(PYTHON)

latest: $(LATEST_INSTALLED)

$(LATEST_INSTALLED): pyproject.toml
	$(call install,$(LATEST_VENV),$(PYTHON_LATEST))

ifeq ($(ENGINE),sglang)
ENGINE_INSTALLED := $(SGLANG_INSTALLED)
ENGINE_ARGS := rollout.engine=sglang rollout.sglang.python=$(SGLANG_VENV)/bin/python
endif

train: $(INSTALLED) $(ENGINE_INSTALLED)
	$(BIN)/python tools/make_tiny_base.py $(BASE_ARGS)
	$(BIN)/megatron-vapo train $(RECIPE) $(ENGINE_ARGS) $(ARGS)

# The fast tier first; what it has checked is not checked again.
test: test-minutes test-fast test-slow

test-minutes:
	@echo "make test: about 30 minutes on two cores, in $(WORKERS) processes; the first 2 are make test-fast"

# No server, no second environment, nothing slow: red or green while one waits.
test-fast: $(INSTALLED)
	$(BIN)/$(PYTEST) -m "not gpu and not slow and not sglang and not slurm"

test-slow: $(INSTALLED) $(SGLANG_INSTALLED)
	SGLANG_VENV=$(SGLANG_VENV) $(BIN)/$(PYTEST) -m "not gpu and (slow or sglang or slurm)"

# The path comes first because an environment may serve several checkouts, as CI's does.
test-latest: $(INSTALLED) $(LATEST_INSTALLED)
	PYTHONPATH=. VENV=$(VENV) LATEST_VENV=$(LATEST_VENV) $(LATEST_VENV)/bin/$(PYTEST) -m "not gpu" $(LATEST_TESTS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

# Every parallel layout against one process and against plain PyTorch; writes docs/layouts.md.
layouts: $(INSTALLED)
	$(BIN)/python -m benchmarks.layouts --write docs/layouts.md

# What only a GPU can show, in minutes; writes docs/verified-on-gpu.md where there is one. It runs in the environment that is
# active (docs/install.md), and makes none.
gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check $(ARGS)

# The GPU node's installation for real, and what of the GPU path runs without a driver: docs/gpu_rehearsal.md.
gpu-rehearsal:
	bash tools/gpu_rehearsal/rehearse.sh $(REHEARSAL) $(PYTHON_LATEST)

doctor: $(INSTALLED)
	$(BIN)/megatron-vapo doctor

clean:
	rm -rf $(VENV) $(SGLANG_VENV) $(LATEST_VENV) artifacts runs .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis *.egg-info
