# Every command makes the environment it needs in .venv, and remakes it when the requirements change.
#
#   make demo     a tour on the small model that ships with the package
#   make test     the whole suite; PYTEST_ARGS="-k name -x" is handed to pytest
#   make check    lint, types and tests: what a change must pass
#   make lint     ruff and pyright alone
#   make bench    what tracing costs
#   make examples run the examples, and draw the pictures of docs/examples.md
#   make families run the tests of every family of models, and write docs/families.md from what they showed
#   make clean    remove .venv and the caches
#
# PYTHON=... names the interpreter .venv is made with.

PYTHON ?= python3.11 python3
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
MAKEFLAGS += --no-print-directory

.PHONY: demo test check lint bench examples families clean

demo: $(VENV)/.demo
	$(BIN)/nnsight demo

test: $(VENV)/.dev
	$(BIN)/pytest $(PYTEST_ARGS)

check: lint test

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/.demo
	@test -f benchmarks/trace_overhead.py || { echo "there are no benchmarks yet" >&2; exit 1; }
	$(BIN)/python benchmarks/trace_overhead.py

examples: $(VENV)/.demo
	@mkdir -p docs/pictures && cd docs/pictures && for script in ../../examples/*.py; do \
		echo "$$script"; ../../$(BIN)/python $$script || exit 1; \
	done

families: $(VENV)/.dev
	$(BIN)/python scripts/families.py

clean:
	rm -rf $(VENV) build dist htmlcov .coverage .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps. An environment that is there already is kept and added to.

$(VENV)/.python:
	@$(BIN)/python -m pip --version >/dev/null 2>&1 && touch $@ && exit; \
	for python in $(PYTHON); do \
		$$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue; \
		echo "making $(VENV) with $$($$python --version)"; \
		$$python -m venv $(VENV) && touch $@; exit; \
	done; \
	echo "Python 3.10 or newer is needed (tried: $(PYTHON)). Name one: make PYTHON=/path/to/python" >&2; exit 1

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(call install,plots)
	@touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints.txt
	$(call install,dev$(comma)plots$(comma)server)
	@touch $(VENV)/.demo $@

# The pins are of releases for Python 3.11 and newer; 3.10 takes the newest releases it has.
comma := ,
define install
@echo "installing nnsight[$(1)] into $(VENV)"
@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(1)]' \
	$$($(BIN)/python -c 'import sys; print("--constraint=constraints.txt" if sys.version_info >= (3, 11) else "")')
endef
