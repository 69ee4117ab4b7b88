# make help lists the commands. Each first makes .venv and installs into it; that is a no-op when current.
.DEFAULT_GOAL := help
.PHONY: help setup serve test format lint types check clean
SHELL := /bin/bash

MODEL ?=
PORT ?= 8000
ARGS ?=
PY := .venv/bin/python
# A process per core; tests of one file stay together, with the engines that they share.
WORKERS := -n auto --maxprocesses 8 --dist loadfile

# The first interpreter that is new enough. Give another one with PYTHON=...
PYTHON = $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: .venv/installed .venv/library  ## create .venv and install everything that serving and testing need

serve: setup  ## serve MODEL (default: the built-in demo) on PORT (8000); more flags in ARGS
	@$(PY) -m fastgen_jax.serve $(if $(MODEL),"$(MODEL)") --port $(PORT) $(ARGS)

test: setup  ## run the tests; ARGS="-k name" picks some, ARGS="-n 0" runs them in one process
	@$(PY) -m pytest $(WORKERS) $(ARGS)

format: setup  ## rewrite the code as ruff formats it
	@$(PY) -m ruff format . && $(PY) -m ruff check --fix .

lint: setup  ## check format and style with ruff
	@$(PY) -m ruff format --check . && $(PY) -m ruff check .

types: setup  ## check types with pyright
	@$(PY) -m pyright

check:  ## everything that continuous integration runs
	@bash .ci/run

clean:  ## remove .venv and all caches
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(PY):
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: fastgen_jax needs Python 3.11 or newer, and none is on the PATH;" \
			"install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is older than Python 3.11" >&2; exit 1; }
	@echo "creating .venv with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv --clear .venv || { rm -rf .venv; \
		echo "error: could not create .venv; on Debian and Ubuntu install python3-venv" >&2; exit 1; }

.venv/installed: pyproject.toml | $(PY)
	@echo "installing fastgen_jax and its dependencies into .venv"
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[test,dev]'
	@touch $@

.venv/library: $(wildcard pallas_kernels/cpu/*.cc pallas_kernels/cpu/*.h) pallas_kernels/cpu/build.py .venv/installed
	@$(PY) -m pallas_kernels.cpu.build
	@touch $@
