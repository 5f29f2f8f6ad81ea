# `make test` and `make demo` each work as the only command on a fresh machine; `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Stamps say what the environment holds; they age when the files that define it change.
VENV_STAMP := $(VENV)/.made
TORCH_STAMP := $(VENV)/.torch
CORE_STAMP := $(VENV)/.core
DEV_STAMP := $(VENV)/.dev

FASHION_MNIST := dataset-fashion-mnist

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export DEBIAN_FRONTEND := noninteractive

INSTALL := $(BIN)/python -m pip install -q -c constraints.txt

MAKEFLAGS += --no-builtin-rules
.SUFFIXES:
# Two targets may call apt-get, which locks.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help test demo lint format data clean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

# pytest comes last: its closing line is the result of the whole. Ray's tests start clusters, one at a time; of the others
# those of a file stay together, which share what is slow to make.
test: data lint ## Install everything, then run ruff, mypy and pytest
	@$(BIN)/python -m pytest -m ray
	@$(BIN)/python -m pytest -m "not ray" -n 2 --dist loadfile

demo: $(CORE_STAMP) ## Install what users get, then run `paretune demo`
	@$(BIN)/paretune demo

lint: $(DEV_STAMP) ## Run ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_STAMP) ## Apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

data: ## Install Debian's Fashion-MNIST where that is possible
	@installed() { dpkg-query -W -f '$${Status}' $(FASHION_MNIST) 2>/dev/null | grep -q '^install ok installed$$'; }; \
	if ! installed && command -v apt-get >/dev/null && [ "$$(id -u)" -eq 0 ]; then \
		echo "==> installing $(FASHION_MNIST)"; \
		{ apt-get update -qq; apt-get install -qq -y --no-install-recommends $(FASHION_MNIST); } >/dev/null 2>&1 || true; \
	fi; \
	installed || echo "note: $(FASHION_MNIST) isn't installed and can't be from here; the tests that need it are" \
		"skipped (as root, on Debian: apt-get install $(FASHION_MNIST))"

clean: ## Remove the environment, caches and builds; results stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find paretune spaces objectives search tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian splits ensurepip off into python3-venv; without it `python3 -m venv` leaves a broken folder behind.
$(VENV_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "paretune needs Python 3.10 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
			"name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@if ! $(PYTHON) -c 'import ensurepip' 2>/dev/null && command -v apt-get >/dev/null && [ "$$(id -u)" -eq 0 ]; then \
		echo "==> installing python3-venv"; \
		{ apt-get update -qq; apt-get install -qq -y --no-install-recommends python3-venv; } >/dev/null 2>&1 || true; \
	fi
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) must be able to make virtual environments, but it has no ensurepip;" \
			"on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --upgrade pip
	@touch $@

# torch goes first and alone, in the very version of constraints.txt: a range that admits a newer one pulls gigabytes of
# CUDA libraries. What is installed after it finds it there.
$(TORCH_STAMP): constraints.txt $(VENV_STAMP)
	@echo "==> installing torch"
	@$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(CORE_STAMP): pyproject.toml constraints.txt $(TORCH_STAMP)
	@echo "==> installing paretune"
	@$(INSTALL) -e .
	@touch $@

# The development install contains the core one: both stamps are set.
$(DEV_STAMP): pyproject.toml constraints.txt $(TORCH_STAMP)
	@echo "==> installing paretune with what its tests need"
	@$(INSTALL) -e ".[dev]"
	@touch $(CORE_STAMP) $@
