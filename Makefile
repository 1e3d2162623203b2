# Two commands do everything on a machine with Python >= 3.10 and a C++ compiler:
#   make demo    environment, build, fine-tunings on handwritten digits, a report to open
#   make test    environment, build, every test
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
JOBS ?= 2
CPP_BUILD ?= build/cpp
DEMO ?= runs/demo
WHEEL_TESTS := arguments records imports loss edge_cases ops portable memory queue gradcache peers distributed
# The demo's control: without the letters.
FROM_SCRATCH := --objectives ce clce --set ce.checkpoint=null clce.checkpoint=null --lr 1e-3 --seeds 0 1 2 3

.DEFAULT_GOAL := help
.PHONY: help setup build wheel wheel-check reference demo study test test-python test-cpp test-sanitized check-sass pipe-model lint format bench bench-pages gpu-check mutation-check soak clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

# The extension is built against the installed torch, hence --no-build-isolation and torch first.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja numpy
	$(RUN) -m pip install --quiet torch torchvision
	$(RUN) -m pip install --no-build-isolation --editable ".[train,bench,test,dev]"
	@touch $@

setup: $(VENV)/.installed ## virtual environment in .venv, with the extension built in place

build: $(VENV)/.installed ## build the extension again after a change in csrc/
	$(RUN) setup.py build_ext --inplace

demo: $(VENV)/.installed ## pre-train on letters, fine-tune on digits by ce, supcon, schane, clce; writes runs/demo/report.html
	$(RUN) -m clce_ext.train --config recipes/letters.yaml --resume --output runs/letters
	$(RUN) -m clce_ext.train.compare --config recipes/demo.yaml --output $(DEMO)
	$(RUN) -m clce_ext.train.compare --config recipes/demo.yaml $(FROM_SCRATCH) --output $(DEMO)/from-scratch
	@echo "open $(DEMO)/report.html; the same from scratch, as a control: $(DEMO)/from-scratch/report.html"

study: $(VENV)/.installed ## the runs behind docs/study.md, what is missing of them, and its tables; CLCE_DATA=DIR for the photographs
	$(RUN) tools/study.py

test: test-cpp test-python ## every test: C++ (the CUDA kernels on the CPU too), then Python

test-python: $(VENV)/.installed
	$(RUN) -m pytest

test-cpp: $(VENV)/.installed
	$(VENV)/bin/cmake -S . -B $(CPP_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DCLCE_CUDA=OFF $(CMAKE_ARGS)
	$(VENV)/bin/cmake --build $(CPP_BUILD) -j $(JOBS)
	$(VENV)/bin/ctest --test-dir $(CPP_BUILD) --output-on-failure -j $(JOBS)

test-sanitized: $(VENV)/.installed ## the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(MAKE) test-cpp CPP_BUILD=build/sanitized CMAKE_ARGS=-DCLCE_SANITIZE=address,undefined

check-sass: $(VENV)/.installed ## what the compiler made of the CUDA kernels: spills, registers, tensor cores (needs nvcc)
	$(RUN) tools/check_sass.py

pipe-model: $(VENV)/.installed ## what the kernels should cost, from their machine code; fails where one has grown (needs nvcc)
	$(RUN) tools/pipe_model.py --check

mutation-check: $(VENV)/.installed ## break the code on purpose, edge case by edge case: a test must notice (20 minutes)
	$(RUN) tools/mutation_check.py

soak: $(VENV)/.installed ## 8,000 random calls of the loss and 15 kills of a run; a table of what held (half an hour of a core)
	$(RUN) tools/soak.py

gpu-check: ## on a machine with a GPU and torch: build, probes, tests, benchmark, sanitizers; within 9 minutes
	$(PYTHON) tools/gpu_check.py

# Built from the source distribution, which therefore lacks nothing. The tag says which Linux the wheel runs on, at
# least; what it takes of torch is not packed in.
wheel: $(VENV)/.installed ## in dist/: one wheel for every Python 3 and every torch from 2.10 on, and the sources
	rm -rf build/wheel dist
	$(RUN) setup.py -q sdist
	$(RUN) -m pip wheel --no-build-isolation --no-deps --wheel-dir build/wheel dist/*.tar.gz
	PATH=$(abspath $(VENV))/bin:$$PATH $(RUN) -m auditwheel repair --exclude 'libtorch*' --wheel-dir dist build/wheel/*.whl
	$(RUN) tools/check_wheel.py dist/*.whl

# In a folder that has the tests but no sources, so that what is tested is what is installed.
wheel-check: ## the wheel in dist/ in a new environment with another torch: make wheel-check TORCH=2.10.0
	rm -rf build/wheel-check
	$(PYTHON) -m venv build/wheel-check
	build/wheel-check/bin/pip install --quiet torch==$(TORCH) numpy pytest pytest-timeout hypothesis psutil pytorch-metric-learning dist/*.whl
	cp -r python_tests bench pyproject.toml build/wheel-check
	cd build/wheel-check && bin/python -m pytest $(WHEEL_TESTS:%=python_tests/test_%.py)

reference: $(VENV)/.installed ## the reference of all that is public, from the docstrings, in build/reference
	$(RUN) -m sphinx -q -W --keep-going -b html docs/reference build/reference

lint: $(VENV)/.installed ## formatters and linters, changing nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/.installed ## formatters, in place
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format -i

bench: $(VENV)/.installed ## throughput and memory against eager, compiled and chunked PyTorch
	$(RUN) -m bench --preset cpu --device cpu

bench-pages: $(VENV)/.installed ## the picture and tables of bench/results/cpu.csv, into README.md and docs/benchmarks.md
	$(RUN) -m bench.table bench/results/cpu.csv --plot --into README.md docs/benchmarks.md

clean:
	rm -rf build dist clce_ext/*.so *.egg-info
