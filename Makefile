# Every target sets up .venv by itself; `make PYTHON=python3.12 test` chooses another interpreter.
PYTHON ?= python3
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test lint bench clean

help:
	@echo "make demo    build a small cache and train a student from it, on a data set that needs no download"
	@echo "make test    lint, then the tests"
	@echo "make lint    ruff, mypy, import directions"
	@echo "make bench   measure and print the tables"
	@echo "make clean   remove .venv and all that tools and builds left here"

demo: $(READY)
	@$(BIN)/kdcache demo

test: lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	bash tests/lint.sh

bench: $(READY)
	@$(BIN)/python bench/run.py

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# __init__.py holds the version, which the installed metadata repeats.
# Of pip's many lines only the long downloads are shown (torch and CUDA are gigabytes), and its errors if it fails.
$(READY): pyproject.toml constraints.txt __init__.py
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        echo "installing python3-venv with apt-get"; \
	        export DEBIAN_FRONTEND=noninteractive; \
	        apt-get -qq update && apt-get -qq install -y --no-install-recommends python3-venv >/dev/null; \
	    else \
	        echo "$(PYTHON) cannot make virtual environments: install python3-venv (sudo apt-get install python3-venv)" >&2; \
	        exit 1; \
	    fi; \
	fi
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"kdcache needs Python 3.11 or later, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	@echo "setting up .venv (some minutes the first time)"
	@$(PYTHON) -m venv .venv
	@PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]' \
	    2>.venv/pip-errors | sed -nu -E '/^ *(Downloading|Using cached) .* (MB|GB)\)/p' \
	    || { cat .venv/pip-errors >&2; exit 1; }
	@touch $@
