# `make run` serves the chat page with the built-in model; `make test` runs every check. Both start from a bare clone.
SHELL := /bin/bash
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The environment variable also reaches the build environments that pip makes for itself.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export npm_config_update_notifier := false
export npm_config_fund := false
PIP := $(BIN)/python -m pip install --quiet --no-warn-script-location
PAGE := gale/server/static/index.html
PAGE_SOURCES := $(shell find web/src web/public web/index.html web/package-lock.json web/*.ts web/*.js web/*.json -type f 2>/dev/null)

.PHONY: run test lint page-test pytest pictures constraints clean

run: $(VENV)/.run-stamp $(PAGE)
	@exec $(BIN)/gale serve $(ARGS)

test: lint page-test pytest

lint: $(VENV)/.test-stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

page-test: web/node_modules/.stamp
	npm --prefix web run --silent format:check
	npm --prefix web run --silent check
	npm --prefix web run --silent test

pytest: $(VENV)/.test-stamp $(PAGE)
	@scripts/need-chromium
	@scripts/need-postgresql
	$(BIN)/pytest $(ARGS)

# The screenshots in the README, taken by the end-to-end test.
pictures: $(VENV)/.test-stamp $(PAGE)
	@scripts/need-chromium
	GALE_PICTURES=$(CURDIR)/docs/images $(BIN)/pytest -q tests/e2e -k pictures

$(VENV)/.run-stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Gale needs Python 3.11 or newer; set PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing Gale into $(VENV) (the first time takes a few minutes) ..."
	@$(PIP) --editable .
	@$(BIN)/python -m gale.model.kernels
	@touch $@

$(VENV)/.test-stamp: $(VENV)/.run-stamp
	@echo "Installing what the tests need ..."
	@$(PIP) --editable '.[dev]'
	@touch $@

web/node_modules/.stamp: web/package.json web/package-lock.json
	@command -v npm >/dev/null || { echo "Gale's page needs Node.js 20 or newer with npm to be built." >&2; exit 1; }
	@echo "Installing what the page is built with ..."
	@npm --prefix web ci --silent --no-audit
	@touch $@

$(PAGE): web/node_modules/.stamp $(PAGE_SOURCES)
	@echo "Building the page ..."
	@npm --prefix web run --silent build -- --logLevel warn
	@touch $@

# Take the newest versions that pyproject.toml allows and write them down (without addresses).
constraints:
	@rm -rf $(VENV)/renew && $(PYTHON) -m venv $(VENV)/renew
	@PIP_CONSTRAINT= $(VENV)/renew/bin/python -m pip install --quiet 'torch==2.13.0' hatchling --editable '.[dev]'
	@{ sed -n 1p constraints.txt; $(VENV)/renew/bin/python -m pip freeze --all --exclude-editable | sed 's/+cpu$$//' | grep -Ev '^(pip|setuptools)=='; } > constraints.new
	@mv constraints.new constraints.txt && rm -rf $(VENV)/renew

clean:
	rm -rf $(VENV) web/node_modules gale/server/static
