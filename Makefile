# Needs nothing but Python 3.10 or newer: every target makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.installed  ## explain photographs, fine-tune on digits, print where the results are
	$(BIN)/python examples/demo.py

test: .venv/.installed  ## run all tests, a module per core at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadscope

lint: .venv/.installed  ## check style, spelling and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

docs: .venv/.docs  ## build the documentation site into build/site
	$(BIN)/mkdocs build --strict

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

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@
