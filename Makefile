# Everything runs from this checkout; nothing but git, make and Python 3.11 or newer is needed beforehand.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint lock

help:  ## Show what can be made
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

setup: $(VENV)/.done  ## Install the system packages that are missing, and the project into .venv

$(VENV)/.done: pyproject.toml requirements.lock scripts/setup-system
	scripts/setup-system
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev,openstack,plot,rivals]'
	touch $@

demo: setup  ## Publish a small Debian, boot it cold, warm, and through a kill -9 of the agent
	scripts/demo

test: setup  ## Lint, check types, and run all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	scripts/run-tests

lint: setup  ## Lint and check types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: setup  ## Pin the versions that are installed now
	$(BIN)/python -m pip freeze --exclude-editable > requirements.lock
