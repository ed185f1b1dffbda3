# Every verb sets up what it needs: its own virtual environment in .venv with the pinned packages.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TEST_SOURCES := $(wildcard tests/support/*.h tests/cuda_host/*.h tests/cuda_host/*.cpp tests/cuda_host/*.cu tests/cuda_host/include/*.h \
                          tests/native/*.h tests/native/*.cpp)
SOURCES := $(wildcard csrc/*.cpp csrc/*/*.h $(foreach kind,h cuh cpp cu,csrc/*/*/*.$(kind))) CMakeLists.txt setup.py pyproject.toml

# CUDA kernels are compiled where nvcc is found; one architecture is enough to develop with.
export CUDAARCHS ?= 90
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo paper test fast sanitize lint format wheel check bench hostile mutants check-gpu clean
.DEFAULT_GOAL := help

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## the main job: Fisher information of every layer of a network that reads camera images
	$(BIN)/python -m fisherfast demo

paper: $(READY) ## the published figures, measured again, about six minutes: ARGS="fig3 fig5"
	$(BIN)/python examples/paper/reproduce.py $(ARGS)

test: $(READY) ## everything: all tests, the slow ones too
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

fast: $(READY) ## the fast tests only
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not slow"

# The op tests that are not slow, on a sanitized module, at every instruction set; those of plain torch
# stand-ins ("torch" in their name) are left out: nothing of theirs is sanitized; so are views of
# untouched gigabytes ("far apart"), which the sanitizer would touch. The environment goes first on
# PATH for its cmake and ninja.
sanitize: $(READY) ## the CPU kernels under the address, undefined and thread sanitizers
	PATH="$(abspath $(BIN)):$$PATH" tests/native/sanitize.sh

lint: $(READY) ## ruff, mypy, clang-format, without changing a file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(SOURCES)) $(TEST_SOURCES)

format: $(READY) ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.cu %.cuh,$(SOURCES)) $(TEST_SOURCES)

wheel: $(READY) ## build a wheel into dist/
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

check: $(READY) ## build facts, devices, every op against its reference
	$(BIN)/python -m fisherfast check

bench: $(READY) ## speed and memory against torch, about fifteen minutes; needs an idle machine
	$(BIN)/python benchmarks/speed/fisher_solve.py $(ARGS)
	$(BIN)/python benchmarks/speed/moments.py $(ARGS)
	$(BIN)/python benchmarks/speed/gradients.py $(ARGS)
	$(BIN)/python benchmarks/speed/curve.py $(ARGS)
	$(BIN)/python benchmarks/speed/dual.py $(ARGS)

hostile: $(READY) ## 10 000 generated problems with closed forms, about 40 minutes: ARGS="--examples 500"
	$(BIN)/python benchmarks/accuracy/run_hostile.py $(ARGS)

mutants: $(READY) ## what the tests are worth: 80 faults in the code, about an hour: ARGS="--seed 1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt cosmic-ray
	$(BIN)/python benchmarks/report/mutants.py $(ARGS)

# With the Python that is given and what is installed there: no environment, no network.
check-gpu: ## all tests, benchmarks and sanitizers on this machine's GPU: PYTHON=python3 ARGS="--output FILE"
	$(PYTHON) benchmarks/gpu/check.py $(ARGS)

clean: ## remove what was built, the virtual environment too
	rm -rf $(VENV) build dist *.egg-info fisherfast/*.so fisherfast-report fisherfast-figures

$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned torch (an open requirement would pull gigabytes of CUDA packages)"
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	touch $@

$(READY): $(VENV)/.torch $(SOURCES)
	@echo "Building fisherfast and installing what it is tested with"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
