# `make test` and `make bench` are all a user needs: each makes its virtual environment, installs torch, builds fastlm and
# runs. The machine needs Python >= 3.10 with pip, and a C++17 compiler (GCC or Clang).

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
CXX_FILES := $(shell find csrc tests/support/cuda_on_host tests/support/ptx/interpreter -type f) $(wildcard benchmarks/suite/*.c)
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)
export CMAKE_BUILD_PARALLEL_LEVEL ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help test bench doctor lint format sanitize gpu-kernels gpu smoke wheel clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

# All tests run in two processes, neighbours in the same one: they share what they import, build and compile. Threads that wait
# for work must sleep meanwhile: they would take the other process's cores.
test: $(VENV)/installed lint ## run the tests (TESTS="tests/ops/test_kl.py -k sign" for some)
	OMP_WAIT_POLICY=passive $(BIN)/pytest $(or $(TESTS),-n 2 --dist worksteal tests)

bench: $(VENV)/installed ## the main job: check, time and train, then report in build/bench (BENCH="--help" for more)
	$(BIN)/fastlm bench $(BENCH)

doctor: $(VENV)/installed ## what this machine, this torch and this build can do
	$(BIN)/fastlm doctor

lint: $(VENV)/installed ## check the style of the Python and the C++ code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/installed ## put the code into that style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The sanitized module lives beside the package it belongs to, in a folder of its own. The base interpreter does not see the
# virtual environment's editable install, only its packages, which come before its own but behind the standard library, whose
# dataclasses one of them has a copy of. The other folders' tests call the C++ code as these do.
SITE = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
SANITIZED := build/sanitize/site
sanitize: $(VENV)/installed ## the tests of the C++ code under AddressSanitizer and UBSan
	$(BIN)/pip install --quiet --upgrade --no-deps --no-build-isolation --target $(SANITIZED) \
	  -C build-dir=build/sanitize/cmake -C cmake.define.FASTLM_SANITIZE=ON -C cmake.define.FASTLM_CUDA=OFF -C install.strip=false .
	echo 'import sys; sys.path.insert(-1, "$(SITE)")' > $(SANITIZED)/sitecustomize.py
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 OMP_WAIT_POLICY=passive PYTHONPATH=$(SANITIZED) $(PYTHON) $(BIN)/pytest \
	  $(or $(TESTS),-n 2 --dist worksteal tests/ops tests/nn tests/integrations -m "not slow_sanitized")

gpu-kernels: $(VENV)/installed ## compile every Triton kernel for every GPU, and print what each is made of (KERNELS=--interpret)
	$(BIN)/python benchmarks/gpu_kernels.py $(KERNELS)

# It makes no environment and installs nothing into one: a torch for the GPU is this Python's own.
gpu: ## on a machine with a GPU: check, time and tune every kernel (PYTHON=..., STEP="smoke tests", GPU="--resume")
	$(PYTHON) benchmarks/on_gpu.py $(STEP) $(GPU)

TORCHES ?= 2.11.0 2.13.0 2.14.1
smoke: ## build the sdist and the wheel as a release, and try the wheel under each torch of TORCHES, in fresh environments
	$(PYTHON) tests/smoke/run.py $(TORCHES)

wheel: $(VENV)/installed ## build a wheel into dist/
	$(BIN)/pip wheel --no-deps --wheel-dir dist .

clean: ## remove everything that was made
	rm -rf $(VENV) build dist

# ---- the environment: made once; fastlm is built again when its C++ changed (Python files are used where they are) ----------

$(VENV)/tools: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastlm needs Python >= 3.10; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --progress-bar off $(TORCH) numpy "scikit-build-core>=0.11" "pybind11>=2.13" cmake ninja clang-format==23.1.5
	@touch $@

$(VENV)/installed: $(VENV)/tools $(SOURCES)
	$(BIN)/pip install --progress-bar off --no-build-isolation -C cmake.define.FASTLM_WERROR=ON --editable ".[test,bench]"
	$(BIN)/pip install --progress-bar off --no-deps "timm>=1.0"  # PyPI's torchvision does not import beside a CPU build of torch
	@touch $@
