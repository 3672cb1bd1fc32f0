# Every target sets up what it needs first; an environment that is up to date costs nothing.
# On Windows, or without make: `python scripts/setup_env.py --extra train --model`, then run what a target runs.

# The interpreter that makes the environment: the first of these that is 3.11 to 3.13.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; exit; }; \
	done; echo python3)
VENV ?= .venv
# Another build of PyTorch than the tested one, for example TORCH=torch on a machine with a GPU.
TORCH ?=
# Passed on to `tokenloom train`, for example ARGS="train.seed=1 train.steps=5".
ARGS ?=

BIN := $(VENV)/bin
SETUP = $(PYTHON) scripts/setup_env.py --venv $(VENV) --torch "$(TORCH)"
CHROMIUM := $(firstword $(foreach name,chromium chromium-browser google-chrome,$(shell command -v $(name) 2>/dev/null)))
# Some systems switch Python's cache of compiled modules off; set-up leaves compiling to the first import (which
# is far quicker than compiling everything), so the cache must be on.
export PYTHONDONTWRITEBYTECODE :=
# One thread for each of two workers: on two cores, threads inside a worker only get in each other's way.
PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS)
WORKERS ?= 2
NO_BROWSER = $(if $(CHROMIUM),,and not browser)

.DEFAULT_GOAL := help
.PHONY: help quickstart install dev test check pytest test-slow bench update docs docs-serve format clean

help: ## show this list
	@echo "Tokenloom. Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Settings: PYTHON=python3.12  TORCH=torch (your own build)  VENV=folder  WORKERS=4  ARGS='train.seed=1'"

quickstart: install ## set up, then train the embedded 135M model on small sums (under 10 minutes on two cores)
	$(BIN)/tokenloom train quickstart $(ARGS)

install: ## set up what users need: .venv with tokenloom[train] and the quickstart's model
	@$(SETUP) --extra train --model

dev: ## set up everything that tests and checks need
	@$(SETUP) --extra train --extra dev --extra parity --model

test: dev check pytest ## set up, then every check and every test but the slow ones (under 10 minutes on two cores)
	@echo "make test: all checks passed"

check: dev ## the checks without the tests: format, lint, types, layers, public API, recipe schema
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/api_snapshot.py --check
	$(BIN)/python scripts/recipe_schema.py --check

pytest: dev ## the tests and doctests, with coverage
	@$(if $(CHROMIUM),,echo "no Chromium or Chrome found: the tests marked 'browser' are left out")
	$(PYTEST) -m "not slow $(NO_BROWSER)" --cov --cov-report=term --durations=10

test-slow: dev ## the long tests: bare environments, kill and resume at many moments, larger models
	@$(if $(CHROMIUM),,echo "no Chromium or Chrome found: the tests marked 'browser' are left out")
	$(PYTEST) -m "slow $(NO_BROWSER)" --durations=20

bench: ## measure against TRL, transformers and vLLM, and rewrite docs/benchmarks.md (some hours, idle machine)
	@$(SETUP) --extra train --extra bench --model
	$(PYTHON) -m bench.setup_vllm
	$(BIN)/python -m bench.run $(ARGS)

update: dev ## rewrite the checked-in public API snapshot and recipe schema after a deliberate change
	$(BIN)/python scripts/api_snapshot.py
	$(BIN)/python scripts/recipe_schema.py

docs: ## build the documentation into site/, one generated page per method
	@$(SETUP) --extra train --extra docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the documentation is in site/index.html"

docs-serve: ## the documentation at a local address, rebuilt on change
	@$(SETUP) --extra train --extra docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

format: dev ## format the code and apply the linter's safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what the tools wrote (the environment too); runs are kept
	rm -rf $(VENV) build dist site htmlcov .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache \
		.import_linter_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
