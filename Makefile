# make quickstart   install, then adapt a real model to real languages and images, minutes
# make test         install, then the test suite
# make docs         the documentation's site, in build/site/index.html
VENV   ?= .venv
PYTHON ?= python3
BIN     = $(VENV)/bin
READY   = $(VENV)/.ready
# The versions that were tested; a release of somebody else changes nothing before `make lock` takes it.
LOCK    = requirements.lock
# What `make lock` takes torch to be: its CPU build keeps development machines and CI small.
TORCH  ?= torch==2.13.0
TORCH_NEWEST ?= torch
# What shows at once that another version of PEFT or transformers behaves differently.
CORE = test_registry.py test_families.py test_contract.py test_trainer.py test_saving.py test_life.py \
	test_peft_expectations.py test_auto_contract.py

.PHONY: help install lock quickstart test test-all test-newest test-oldest test-peft quality prose docs format docs-tables package benchmark gpu-check clean

help:
	@grep -E '^# make' Makefile | cut -c3-

install: $(READY)

$(READY): pyproject.toml $(LOCK) Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(LOCK) torch setuptools
	$(BIN)/python -m pip install --quiet --constraint $(LOCK) --no-build-isolation --editable ".[dev]"
	touch $@

# the newest versions that pyproject.toml takes, into the lock; run the whole suite before you commit it
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --upgrade uv
	echo "$(TORCH)" | build/lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev \
		--no-annotate --custom-compile-command "make lock" --output-file $(LOCK) pyproject.toml -

quickstart: install
	$(BIN)/python -m benchmarks.quickstart

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not full"

# every family with every method and behaviour
test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# the contract's core with the newest releases and pre-releases of everything, in an environment of their own
test-newest:
	$(PYTHON) -m venv build/newest
	build/newest/bin/python -m pip install --quiet --upgrade --pre "$(TORCH_NEWEST)" ".[test]"
	cd tests && OMP_NUM_THREADS=1 ../build/newest/bin/python -m pytest -n 2 -m "not full" $(CORE)

# the lowest versions of pyproject.toml, in an environment of their own
test-oldest:
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet torch==2.6.0 transformers==5.0.0 peft==0.21.0 accelerate==1.3.0 ".[test]"
	cd tests && OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore ../build/oldest/bin/python oldest.py

# PEFT's own tests (of its sdist, in build/) on every method, compared with the kept list of what they refuse
test-peft: install
	version=$$($(BIN)/python -c 'import peft; print(peft.__version__)') && \
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest build "peft==$$version" && \
	tar -xzf build/peft-$$version.tar.gz -C build && \
	OMP_NUM_THREADS=1 $(BIN)/python tests/peft_own.py build/peft-$$version

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/prose.py
	$(MAKE) --no-print-directory docs

# no sentence above 36 words, no word that the house gave up: in pages, public docstrings and messages
prose: install
	$(BIN)/python tests/prose.py

# the site of the documentation in build/site; any warning, such as a broken link, is an error
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# wheel and sdist in dist/, the wheel installed with its dependencies into a fresh environment
package: install
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet --constraint $(LOCK) dist/*.whl
	cd build && clean/bin/python -m peft_multimodal --help

# the README's table of methods and the index of docs/, from the registry
docs-tables: install
	$(BIN)/python tests/docs_tables.py

# hours of CPU; results that are there already are kept
benchmark: install
	for task in benchmarks/experiments/*; do $(BIN)/python -m benchmarks.run --task $$(basename $$task) --experiment all --seeds 0 1 2; done
	$(BIN)/python -m benchmarks.run report

# every method on a GPU, beside LoRA; says why and stops where there is none
gpu-check: install
	$(BIN)/python -m benchmarks.gpu_check

clean:
	rm -rf $(VENV) build dist *.egg-info runs
