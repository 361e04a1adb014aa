# make quickstart   install, then adapt a real model to real pictures (two jobs, minutes)
# make test         install, then the test suite
VENV   ?= .venv
PYTHON ?= python3
# The CPU build keeps development machines and CI small. The package itself takes any torch >= 2.6.
TORCH  ?= torch==2.13.0
BIN     = $(VENV)/bin
READY   = $(VENV)/.ready

.PHONY: help install quickstart test test-all test-oldest quality format package benchmark gpu-check clean

help:
	@grep -E '^# make' Makefile | cut -c3-

install: $(READY)

$(READY): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

quickstart: install
	$(BIN)/python -m benchmarks.quickstart
	$(BIN)/python -m benchmarks.quickstart_language

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not full"

# every family with every method and behaviour
test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# the lowest versions of pyproject.toml, in an environment of their own
test-oldest:
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet torch==2.6.0 transformers==5.0.0 peft==0.21.0 accelerate==1.3.0 ".[test]"
	cd tests && OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore ../build/oldest/bin/python oldest.py

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# wheel and sdist in dist/, the wheel installed with its dependencies into a fresh environment
package: install
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet "$(TORCH)" dist/*.whl
	cd build && clean/bin/python -m peft_multimodal --help

# hours of CPU; results that are there already are kept
benchmark: install
	for task in benchmarks/experiments/*; do $(BIN)/python -m benchmarks.run --task $$(basename $$task) --experiment all --seeds 0 1 2; done
	$(BIN)/python -m benchmarks.run report

# every method on a GPU, beside LoRA; says why and stops where there is none
gpu-check: install
	$(BIN)/python -m benchmarks.gpu_check

clean:
	rm -rf $(VENV) build dist *.egg-info runs
