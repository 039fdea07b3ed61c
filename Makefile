# `make demo` and `make test` work from a fresh clone: what they need is installed once into .venv.
PYTHON ?= python3
# The build of PyTorch to install, by default the tested release. For instance, without CUDA:
#   make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= $(shell grep '^torch==' constraints.txt)
# How many processes run tests.
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip -qq

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types check format docs bench clean

help: ## list these commands
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf 'make %-8s %s\n' "$$name" "$$text"; done

setup: $(STAMP) ## install everything into .venv (the other commands do it by themselves)

# PyTorch goes first, by itself: a resolve that has to choose it may fetch a newer build and gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV) (once; a few minutes) ..."
	@$(PIP) install $(TORCH)
	@$(PIP) install -c constraints.txt -e ".[dev,demo,docs,data,evaluate,lora,plots]"
	@touch $@

demo: $(STAMP) ## build real experts, merge them, print base, experts and merged side by side
	@$(BIN)/python examples/demo.py

test: $(STAMP) ## run the tests
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

lint: $(STAMP) ## ruff: rules and format
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --check .; exit 1; }

types: $(STAMP) ## strict types
	@$(BIN)/mypy --no-error-summary

check: lint types test ## all three

format: $(STAMP) ## let ruff mend what it can
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

docs: $(STAMP) ## build the site into site/, warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(STAMP) ## measure against the floor and the peer, print ratios
	@$(BIN)/python benchmarks/static.py

clean: ## remove what was built, .venv excepted
	@rm -rf build dist site runs demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
