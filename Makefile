# Every target sets up .venv by itself; `make PYTHON=python3.12 test` chooses another interpreter.
PYTHON ?= python3
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
READY := .venv/.ready
, := ,
# What the extra kdcache[ffcv] compiles against.
FFCV_PACKAGES := g++ pkg-config python3-dev libturbojpeg0-dev libopencv-dev
# Some tests look at pages in it.
BROWSER_PACKAGES := chromium

.PHONY: help demo test quick oldest lint collected checked format bench gpu docs dist release-check clean

help:
	@echo "make demo    build a small cache and train a student from it, on a data set that needs no download"
	@echo "make test    lint, then the tests"
	@echo "make quick   lint, then the tests that need no training: under two minutes on two cores"
	@echo "make format  format the code and sort its imports"
	@echo "make lint    ruff, mypy, import directions"
	@echo "make oldest  the tests with the oldest versions of what kdcache depends on, in .venv-oldest"
	@echo "make bench   measure and print the tables"
	@echo "make gpu     what a GPU machine tells, in at most eight minutes: tests, speeds, students against the clock"
	@echo "make docs    the pages of docs/ as a site: site/index.html"
	@echo "make dist    the source distribution and, from that, the wheel, in dist/"
	@echo "make release-check  look through both, install the wheel in environments made from nothing, and use it there"
	@echo "make clean   remove .venv, .venv-oldest and all that tools and builds left here"

demo: $(READY)
	@$(BIN)/kdcache demo

# What Python compiles is kept, whatever the environment says: each of a thousand processes would compile it anew.
export PYTHONDONTWRITEBYTECODE =

test: checked
	@bash tests/run.sh $(BIN)

quick: checked
	@bash tests/run.sh $(BIN) -m "not slow"

format: $(READY)
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

# With the oldest versions that pyproject.toml admits, without FFCV. It takes long: for who changes a bound there.
oldest: .venv-oldest/.ready
	@bash tests/run.sh .venv-oldest/bin

.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -q -c constraints-oldest.txt -e '.[test,hf,report,tensorboard,timm]'
	@touch $@

# While one core checks types, another one collects the tests: what pytest and Python compile of them is kept for the
# processes that run them, each of which would compile it anew.
checked: $(READY)
	@$(MAKE) --no-print-directory -j2 lint collected

collected: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --collect-only >.venv/collected 2>&1 || { cat .venv/collected >&2; exit 1; }

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	bash tests/lint.sh

bench: $(READY)
	@cd bench && ../$(BIN)/kdcache bench --data pixels:noise --teacher resnet56 --student resnet20 --batch-size 256 \
	    --out results/bench.json

# GPU=--dry tries it out on a CPU; GPU='--cifar cifar10:PATH' gives it real images.
gpu: $(READY)
	@cd bench && ../$(BIN)/python gpu.py $(GPU)

# Warnings are errors, so that no link and no reference is broken.
docs: .venv/.docs-ready
	@rm -rf site
	@OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -j auto -d .venv/doctrees docs site
	@echo "site/index.html"

.venv/.docs-ready: $(READY) pyproject.toml constraints.txt
	@echo "installing what the site is made with"
	@$(call INSTALL,docs,.venv/docs-errors) || { cat .venv/docs-errors >&2; exit 1; }
	@touch $@

# The wheel is made from the source distribution, so that both are known to be whole.
dist: $(READY)
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation --outdir dist . >.venv/dist-output 2>&1 || { cat .venv/dist-output >&2; exit 1; }
	@rm -rf kdcache.egg-info
	@ls -l dist

release-check: dist
	@cd bench && ../$(BIN)/python release_check.py

clean:
	rm -rf .venv .venv-oldest build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# $(call INSTALL,extras,file for pip's errors): of its many lines only the long downloads are shown (torch and CUDA are
# gigabytes). Python compiles what is imported when it first is, which is a small part of all that is installed.
INSTALL = PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt \
    -e '.[$(1)]' 2>$(2) | sed -nu -E '/^ *(Downloading|Using cached) .* (MB|GB)\)/p'
HAVE_FFCV_LIBRARIES = { command -v c++ && pkg-config --exists opencv4 libturbojpeg; } >/dev/null 2>&1
HAVE_BROWSER = command -v chromium >/dev/null

# __init__.py holds the version, which the installed metadata repeats.
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
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { $(HAVE_FFCV_LIBRARIES) && $(HAVE_BROWSER); }; then \
	    export DEBIAN_FRONTEND=noninteractive; \
	    apt-get -qq update || true; \
	    if ! $(HAVE_FFCV_LIBRARIES); then \
	        echo "installing what FFCV compiles against with apt-get: $(FFCV_PACKAGES)"; \
	        apt-get -qq install -y --no-install-recommends $(FFCV_PACKAGES) >/dev/null || true; \
	    fi; \
	    if ! $(HAVE_BROWSER); then \
	        echo "installing the browser of some tests with apt-get: $(BROWSER_PACKAGES)"; \
	        apt-get -qq install -y --no-install-recommends $(BROWSER_PACKAGES) >/dev/null || \
	            echo "going on without it: tests that look at pages in a browser are skipped"; \
	    fi; \
	fi
	@if ! { $(HAVE_FFCV_LIBRARIES) && $(call INSTALL,dev$(,)ffcv,.venv/ffcv-errors); }; then \
	    echo "going on without FFCV; for it: sudo apt-get install $(FFCV_PACKAGES); then make clean test"; \
	    [ ! -e .venv/ffcv-errors ] || echo "(it could not be installed: see .venv/ffcv-errors)"; \
	    $(call INSTALL,dev,.venv/pip-errors) || { cat .venv/pip-errors >&2; exit 1; }; \
	fi
	@touch $@
