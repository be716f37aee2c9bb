# Two commands on a machine that has only Python 3.11 or newer: `make demo` and `make test`.
# Each creates .venv when it is missing; stamps in it keep the second call free of pip.
# Every package is installed from a lock with hashes (requirements/), without looking for others; torch alone has no hash.

ENV := .venv
BIN := $(ENV)/bin
STAMPS := $(ENV)/stamps
TORCH := $(shell grep '^torch==' requirements/torch.txt)

PYTHON ?=
PIP_ARGS ?=
ARGS ?=
WORKERS ?= 2

PIP := $(BIN)/python -m pip install --quiet $(PIP_ARGS)
LOCKED := $(PIP) --no-deps --require-hashes -r
SELF := $(PIP) --no-deps --no-build-isolation -e .
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test coverage lint types docs lock clean

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

coverage: export OMP_NUM_THREADS ?= 1
coverage: export HF_HUB_OFFLINE ?= 1
coverage: $(STAMPS)/dev  ## lines and branches of the core that the tests reach; fails below 95%
	$(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term:skip-covered --cov-report=json:coverage.json $(ARGS)

lint: $(STAMPS)/dev  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/dev  ## mypy, strict, on src/slicefine (settings in pyproject.toml)
	$(BIN)/mypy

docs: $(STAMPS)/dev  ## build the site into site/, offline; dead links and anchors are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

LOCK := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url \
  --custom-compile-command 'make lock' --excludes requirements/without.txt pyproject.toml requirements/base.in
lock:  ## write requirements/*.txt anew after a change of pyproject.toml; needs uv, UPGRADE=--upgrade renews versions
	$(LOCK) $(UPGRADE) --extra dev -o requirements/dev.txt
	$(LOCK) --extra demo -c requirements/dev.txt -o requirements/demo.txt

clean:  ## remove the environment, caches and builds; runs/ stays
	rm -rf $(ENV) dist build site .pytest_cache coverage.json .coverage .mypy_cache .ruff_cache .hypothesis
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

# after the packages that torch needs, so that pip finds them installed and takes none without a hash
$(STAMPS)/torch: requirements/torch.txt
	@echo "Installing $(TORCH) (some minutes the first time)."
	@$(PIP) $(TORCH)
	@touch $@

# editable: a change of the sources needs no new installation
$(STAMPS)/demo: pyproject.toml requirements/demo.txt requirements/torch.txt $(STAMPS)/python
	@echo "Installing what slicefine[demo] needs."
	@$(LOCKED) requirements/demo.txt
	@$(MAKE) --no-print-directory $(STAMPS)/torch
	@$(SELF)
	@touch $@

# dev contains demo, so one installation serves both
$(STAMPS)/dev: pyproject.toml requirements/dev.txt requirements/torch.txt $(STAMPS)/python
	@echo "Installing what slicefine[dev] needs."
	@$(LOCKED) requirements/dev.txt
	@$(MAKE) --no-print-directory $(STAMPS)/torch
	@$(SELF)
	@touch $(STAMPS)/demo $@
