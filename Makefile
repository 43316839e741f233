# Every target sets up what it needs in .venv; only Python >= 3.11 (with venv and pip) is assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Plain CPU runs must not look for a TPU that an installed libtpu promises.
export JAX_PLATFORMS ?= cpu
# Material for MkDocs otherwise prints news of other projects at each start.
export NO_MKDOCS_2_WARNING = 1

.PHONY: help train detect test compare small_objects detect_pools lint docs docs-serve ci clean interpreter
.DEFAULT_GOAL := help

help:  ## Show what can be made.
	@grep -E '^[a-z_-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

train: $(VENV)/.train  ## Train the embedded job (about 5 minutes on 2 cores) into runs/cluttered_digits.
	$(BIN)/python train.py --config=configs/cluttered_digits.py --workdir=runs/cluttered_digits

detect: $(VENV)/.train  ## Train the embedded detector (about 6 minutes on 2 cores) into runs/detect_digits.
	$(BIN)/python train.py --config=configs/detect_digits.py --workdir=runs/detect_digits

test: $(VENV)/.test  ## Run all tests.
	$(BIN)/python -m pytest -n auto --maxprocesses=8 --dist worksteal

compare: $(VENV)/.train  ## Train the embedded job with each pooling, three seeds each (twelve trainings).
	$(BIN)/python benchmarks/compare_pools.py --workdir=runs/compare_pools

small_objects: $(VENV)/.train  ## Accuracy by pooling as objects get smaller and clutter denser (21 trainings).
	$(BIN)/python benchmarks/small_objects.py --workdir=runs/small_objects

detect_pools: $(VENV)/.train  ## The embedded detector with each pooling, five seeds each (25 trainings).
	$(BIN)/python benchmarks/detect_pools.py --workdir=runs/detect_pools

lint: $(VENV)/.lint  ## Check formatting, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.docs  ## Build the docs site into site/; warnings are errors.
	$(BIN)/mkdocs --quiet build --strict

docs-serve: $(VENV)/.docs  ## Show the docs site at http://127.0.0.1:8000, anew after each change.
	$(BIN)/mkdocs serve --strict

ci: lint docs test  ## What continuous integration runs.

clean:  ## Remove the virtual environment and caches; keeps runs/.
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache build *.egg-info

# A stamp per extra: installed again when the project's requirements change.
$(VENV)/.%: pyproject.toml constraints.txt | interpreter
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

# .venv's own, which is the one that was asked for, if one was.
interpreter:
	@test -x $(BIN)/python || { $(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11)' && \
	  $(PYTHON) -m venv $(VENV); } || \
	  { echo "Python 3.11 or newer is needed, with venv: make PYTHON=python3.13 ..."; exit 1; }
	@test "$(origin PYTHON)" = file || test "$$($(PYTHON) -V)" = "$$($(BIN)/python -V)" || \
	  { echo "$(VENV) is of $$($(BIN)/python -V), not of $(PYTHON): make clean, or add" \
	  "VENV=.venv-$(notdir $(PYTHON))"; exit 1; }
