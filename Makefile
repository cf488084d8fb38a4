# Sets up `.venv` with the versions of constraints.txt and runs things in it. Needs Python 3.11 or newer and PyPI.
#
#   make quickstart                        every step on a simulated corpus, some minutes on two cores
#   make quickstart DATA="a.h5ad b.h5ad"   every step on your own raw counts
#   make test                              the tests
#
# PYTHON=python3.12 chooses the interpreter that makes `.venv`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA ?=
ANNOTATIONS ?=
ARGS ?=

# For Pythons before 3.11, which may know neither the syntax nor the packages.
define CHECK_PYTHON
{ $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "error: TxFM needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
    "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }; }
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart test test-slow lint types constraints clean

help:
	@sed -n '/^#   /s/^#  //p' Makefile

install: $(STAMP)

# The stamp is the last thing written, so an interrupted install leaves none and the next call goes on from there.
# torch and its constraint are in the one call of pip: resolved alone, torch would be the newest, with more than it needs.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@rm -f $(STAMP)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { $(CHECK_PYTHON) && $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dask,dev,eval]'
	@touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/txfm quickstart $(if $(strip $(DATA)),--data $(DATA)) \
	  $(if $(strip $(ANNOTATIONS)),--annotations $(ANNOTATIONS)) $(ARGS)

# Two workers, each taking whole files: fixtures of a module are made once. A worker that dies ends the run, which would hang
# otherwise. Slow tests measure, so they run alone.
test: $(STAMP)
	$(BIN)/pytest --numprocesses 2 --dist loadfile --max-worker-restart 0 $(ARGS)

test-slow: $(STAMP)
	$(BIN)/pytest -m "slow and not gpu and not network" $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# After changing what setup.cfg asks for: install without the old constraints, run the tests, then write the new ones.
constraints:
	@{ sed -n '/^#/p' constraints.txt; \
	   $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip --exclude wheel | sed -e 's/+cpu$$//'; } > constraints.txt.part
	@mv constraints.txt.part constraints.txt

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .coverage htmlcov
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
