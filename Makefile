# Two commands on a machine that has only Python 3.11 or newer: `make demo` and `make test`.
# Each creates .venv when it is missing; stamps in it keep the second call free of pip.

ENV := .venv
BIN := $(ENV)/bin
STAMPS := $(ENV)/stamps
TORCH := $(shell grep '^torch==' constraints.txt)

PYTHON ?=
PIP_ARGS ?=
ARGS ?=
WORKERS ?= 2

PIP := $(BIN)/python -m pip install --quiet -c constraints.txt $(PIP_ARGS)
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test lint types clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1|/' | column -t -s '|' 2>/dev/null \
	  || grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST)
	@echo
	@echo '  PYTHON=python3.12   another interpreter (3.11 or newer) for a new environment'
	@echo '  ARGS="..."          further arguments for slicefine train or pytest'
	@echo '  PIP_ARGS="..."      further arguments for pip, such as an index that has CPU builds of torch'

demo: $(STAMPS)/demo  ## set up and run the embedded default: MiniLM on docstrings, offline
	$(BIN)/slicefine train $(ARGS)

# one thread per worker: two pytest workers share two cores
test: export OMP_NUM_THREADS ?= 1
test: export HF_HUB_OFFLINE ?= 1
test: $(STAMPS)/dev  ## set up and run the tests
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(STAMPS)/dev  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/dev  ## mypy, strict, on src/slicefine (settings in pyproject.toml)
	$(BIN)/mypy

clean:  ## remove the environment, caches and builds; runs/ stays
	rm -rf $(ENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/python:
	@if $(BIN)/python $(IS_NEW_ENOUGH) && $(BIN)/python -c 'import pip' 2>/dev/null; then mkdir -p $(STAMPS); touch $@; exit 0; fi; \
	for python in $(or $(PYTHON),python3.11 python3 python3.12 python3.13 python); do \
	  if $$python $(IS_NEW_ENOUGH); then \
	    echo "Creating $(ENV) with $$($$python --version)."; \
	    $$python -m venv --clear $(ENV) || { \
	      echo "Python cannot create an environment: on Debian and Ubuntu install the package python3-venv." >&2; exit 1; }; \
	    mkdir -p $(STAMPS); touch $@; exit 0; \
	  fi; \
	done; \
	echo "SliceFine needs Python 3.11 or newer; found: $$($(or $(PYTHON),python3) --version 2>&1 | head -n 1)." >&2; \
	echo "Install Python 3.11, or name one: make $(or $(MAKECMDGOALS),test) PYTHON=/path/to/python3.11" >&2; \
	exit 1

$(STAMPS)/torch: constraints.txt $(STAMPS)/python
	@echo "Installing $(TORCH) (some minutes the first time)."
	@$(PIP) $(TORCH)
	@touch $@

# editable: a change of the sources needs no new installation
$(STAMPS)/demo: pyproject.toml $(STAMPS)/torch
	@echo "Installing slicefine[demo]."
	@$(PIP) -e '.[demo]'
	@touch $@

# dev contains demo, so one installation serves both
$(STAMPS)/dev: pyproject.toml $(STAMPS)/torch
	@echo "Installing slicefine[dev]."
	@$(PIP) -e '.[dev]'
	@touch $(STAMPS)/demo $@
