# Each command first sets up what it needs: .venv, the pinned dependencies, the compiled extension. A second run
# repeats only what has changed.
#
#   make test                     the tests; make test ARGS="-k wheel" for a part of them
#   make test-full                also the tests marked `full`: every architecture, instruction set and shape
#   make bench                    the benchmark suite that takes less than ten minutes
#   make bench-amx                on a processor with AMX: test its kernels, then measure what needs it, and compare with
#                                 what the library has to reach; resumes; half an hour
#   make gpu                      on a machine with an NVIDIA GPU, with its own Python (torch, Triton; nothing is downloaded):
#                                 check every kernel, then benchmark, within nine minutes; OUT=folder for the results,
#                                 ARGS="--only op,conv" for some of the stages
#   make gpu-more                 likewise, what takes longer: test suite, compute-sanitizer, max-autotune, timm
#   make gpu-rehearsal            all of `make gpu` on this machine, on tiny tensors, without a GPU
#   make gpu-env                  on a machine with nvcc 13, without a GPU: build against the oldest supported torch in its
#                                 CUDA build (7 GB), import, compile the Triton kernels, run the tests (ARGS="-k wheel");
#                                 GPU_ENV_PYTHON=python3.12 makes the environment build/gpu-env/venv, GPU_ENV=folder
#                                 uses an existing one, STEPS=build,check for some steps
#   make gpu-library              compile the kernels for the GPU machine here, with the same environment. The call of the
#                                 device tool that runs `make gpu` there:
#                                 run(command='make gpu OUT="$OUT"', carry=["build/gpu-library"], timeout_s=590)
#   make study                    train plain and residual networks and write docs/depth-study; a quarter of an hour,
#                                 resumes after an interruption
#   make docs                     the API pages from the docstrings (Markdown in docs/api, HTML in build/docs/html), and
#                                 the pages of results from benchmarks/results
#   make lint                     ruff, clang-format, mypy;  make format  fixes what they can fix
#   make build                    only the set-up
#   make clean                    remove .venv and everything built
#   PYTHON=python3.12 make test   with another Python: .venv is recreated if its Python differs

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.stamp-venv
DEPENDENCIES := $(VENV)/.stamp-dependencies
BUILT := $(VENV)/.stamp-build

CPP_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
TEST_FILES := $(shell find tests tools -name '*.cpp' -o -name '*.h' -o -name '*.cu')
ARGS :=
# Some tests use one core, some all: two processes at a time, whose threads yield their core while they wait.
# Files go to them in the order of tests/conftest.py, the longest first. A test that takes ten minutes is stuck: the
# stacks of its threads are printed, and the run ends (faulthandler_timeout in pyproject.toml).
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
  --no-loadscope-reorder --max-worker-restart 0
GPU_PYTHON := python3
GPU_ENV_PYTHON := python3.12
GPU_ENV := build/gpu-env/venv
STEPS := build,check,compile,test

.PHONY: test test-full bench bench-amx study docs gpu gpu-more gpu-rehearsal gpu-env gpu-library lint format build clean FORCE

test: $(BUILT)
	$(PYTEST) $(ARGS)

test-full: $(BUILT)
	$(PYTEST) -m "" $(ARGS)

bench: $(BUILT)
	$(BIN)/python -m benchmarks all

bench-amx: $(BUILT)
	$(BIN)/python -m benchmarks.amx $(ARGS)

study: $(BUILT)
	$(BIN)/python -m examples.depth_study
	mkdir -p docs/depth-study
	cp build/depth-study/report/* docs/depth-study/

docs: $(BUILT)
	$(BIN)/python -m sphinx -b markdown -E -q -W docs/sphinx docs/api -d build/docs/doctrees
	$(BIN)/python -m sphinx -b html -E -q -W docs/sphinx build/docs/html -d build/docs/doctrees
	$(BIN)/python -m benchmarks.readme

gpu:
	$(GPU_PYTHON) -m benchmarks.gpu first-hour $(if $(OUT),--out "$(OUT)") $(ARGS)

gpu-more:
	$(GPU_PYTHON) -m benchmarks.gpu more $(if $(OUT),--out "$(OUT)") $(ARGS)

gpu-rehearsal: $(BUILT)
	$(BIN)/python -m benchmarks.gpu first-hour --rehearse $(if $(OUT),--out "$(OUT)") $(ARGS)

# An environment outside of build/ is the user's own.
GPU_ENV_READY := $(if $(filter build/%,$(GPU_ENV)),$(GPU_ENV)/.stamp)

gpu-env: $(GPU_ENV_READY)
	$(GPU_ENV)/bin/python tools/gpu_env.py --steps $(STEPS) -- $(ARGS)

gpu-library: $(GPU_ENV_READY)
	$(GPU_ENV)/bin/python -m benchmarks.gpu.library

build/gpu-env/venv/.stamp: requirements/gpu.txt
	$(GPU_ENV_PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --requirement requirements/gpu.txt
	@touch $@

lint: $(DEPENDENCIES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES) $(TEST_FILES)
	$(BIN)/mypy

format: $(DEPENDENCIES)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES) $(TEST_FILES)

build: $(BUILT)

clean:
	rm -rf $(VENV) build *.egg-info fused_res/_C.* fused_res/_cuda.*

# FUSED_RES_CPP=1: here a compiler that does not work is an error, not a reason to go on without it.
$(BUILT): $(DEPENDENCIES) $(CPP_FILES) CMakeLists.txt $(wildcard cmake/*.*) setup.py pyproject.toml
	FUSED_RES_CPP=1 $(BIN)/python -m pip install --no-build-isolation --no-deps --editable .
	@touch $@

$(DEPENDENCIES): $(READY) requirements/dev.txt requirements/peers.txt
	$(BIN)/python -m pip install --requirement requirements/dev.txt
	$(BIN)/python -m pip install --no-deps --requirement requirements/peers.txt
	@touch $@

# Only an explicit PYTHON replaces an existing .venv.
ifdef PYTHON
WHICH := -c 'import sys; print(sys.base_prefix, sys.version)'
ifneq ($(shell $(PYTHON) $(WHICH)),$(if $(wildcard $(BIN)/python),$(shell $(BIN)/python $(WHICH))))
$(READY): FORCE
endif
endif
PYTHON ?= python3

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo '$(PYTHON) is not Python 3.11 or newer; choose one: PYTHON=python3.12 make'; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || \
	  { echo '$(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv'; exit 1; }
	@touch $@
