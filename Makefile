# Needs nothing but Python 3.10 or newer: every target makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.installed  ## explain photographs, fine-tune on digits, print where the results are
	$(BIN)/python examples/demo.py

test: .venv/.installed  ## run all tests
	$(BIN)/python -m pytest

lint: .venv/.installed  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed  ## measure the engine: time and memory as ratios to a forward pass
	$(BIN)/python benchmarks/engine.py

clean:  ## remove what make made: environment, builds, caches; never logs, results or data
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "gmarpp needs Python 3.10 or newer: set PYTHON=/path/to/python")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[demo,dev]'
	touch $@
