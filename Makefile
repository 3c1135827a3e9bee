# The whole project in two commands: `make demo` shows what it does, `make test` shows that it is right.
# Both build .venv on their own; no compiler is needed. Another Python: `make test PYTHON=python3.13`.

PYTHON ?= python3
VENV := .venv

# Recipes run the very commands a user types in the activated environment. SHELL is set because make, when it starts a
# simple command without a shell, looks it up in its own PATH and not in this one.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PATH := $(VIRTUAL_ENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONHOME PYTHONPATH

.DEFAULT_GOAL := help
.PHONY: help demo test test-ranks test-cluster lint clean

help:
	@echo "make demo    simulate a moving molecule, reconstruct it, compare with the truth: demo/run/report.html"
	@echo "make test    ruff, pyright and pytest, one summary at the end (PYTEST_ARGS=... goes to pytest)"
	@echo "make test-ranks   the tests that train on several processes, kill and restart them (CI runs them too)"
	@echo "make test-cluster the tests on a real Slurm, Ray and browser, which it installs where it may (CI runs them too)"
	@echo "make lint    ruff and pyright only"
	@echo "make clean   remove what the other targets made, .venv included"

# ---- environment: installed again only when what it is made from has changed

PYTHON_IS_NEW_ENOUGH := import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	f"spire_dist needs Python 3.11 or newer and this is {sys.version.split()[0]}: make PYTHON=python3.12")

$(VENV)/bin/python:
	@$(PYTHON) -c '$(PYTHON_IS_NEW_ENOUGH)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-for-use: pyproject.toml constraints.txt | $(VENV)/bin/python
	python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/installed-for-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	python -m pip install --quiet -c constraints.txt -e '.[dev,deepspeed,ray,slurm]'
	@touch $@ $(VENV)/installed-for-use

# ---- demo: the README's commands, one after the other

DEMO_SIMULATE ?=
DEMO_TRAIN ?= --preset demo

demo: $(VENV)/installed-for-use
	spire-dist simulate demo/data $(DEMO_SIMULATE)
	spire-dist prep demo/data/particles.star demo/store
	spire-dist train --store demo/store --run demo/run $(DEMO_TRAIN)
	spire-dist evaluate demo/run demo/data
	@echo "open demo/run/report.html"

# ---- checks: all of them run, then one line says which failed

LINT := "ruff check ." "ruff format --check ." "pyright"
PYTEST := "pytest -m 'not ranks' --ignore=tests/cluster $(PYTEST_ARGS)"
# Two files at a time: most of their time they wait for servers.
PYTEST_CLUSTER := "pytest tests/cluster --numprocesses 3 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)"
PYTEST_RANKS := "pytest -m ranks --ignore=tests/cluster $(PYTEST_ARGS)"
run_checks = failed=; for check in $(1); do echo "== $$check"; eval "$$check" || failed="$$failed [$$check]"; done; \
	if [ -n "$$failed" ]; then echo "FAILED:$$failed"; exit 1; fi; echo "all checks passed"

test: $(VENV)/installed-for-test
	@$(call run_checks,$(LINT) $(PYTEST))

test-ranks: $(VENV)/installed-for-test
	@$(call run_checks,$(PYTEST_RANKS))

test-cluster: $(VENV)/installed-for-test
	@$(call run_checks,$(PYTEST_CLUSTER))

lint: $(VENV)/installed-for-test
	@$(call run_checks,$(LINT))

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
