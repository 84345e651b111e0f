# One environment, .venv, holds everything; it is made once and reused.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
BIN := .venv/bin
RUN ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help install demo test oldest newest families check format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: .venv/installed ## make .venv with everything in it (the other targets do this by themselves)

demo: .venv/installed ## train a small GPT-2 with and without the penalty; write a page about its heads
	$(BIN)/entropy-reg demo --output $(RUN)

test: .venv/installed ## run the tests
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

oldest: ## run the tests on the oldest versions that pyproject.toml admits (5 GB into .venv-oldest)
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[tests]'
	.venv-oldest/bin/python -m pytest --numprocesses 2 --dist worksteal

newest: ## run the tests on the newest versions that pip finds (6 GB into .venv-newest)
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e '.[tests]'
	.venv-newest/bin/python -m pytest --numprocesses 2 --dist worksteal

families: .venv/installed ## check the recording of every transformers family; write docs/families.md
	$(BIN)/python scripts/families

check: .venv/installed ## formatting, lint, types and the rooms of DESIGN.md
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what the other targets made, except runs/
	rm -rf .venv .venv-oldest .venv-newest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
