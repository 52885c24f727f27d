# Every command makes the environment it needs in .venv, and remakes it when the requirements change.
#
#   make demo     a tour on the small model that ships with the package
#   make test     the whole suite; PYTEST_ARGS="-k name -x" is handed to pytest
#   make check    lint, types and tests: what a change must pass
#   make test-vllm  the tests of vLLM engines, in an environment of their own (.venv-vllm)
#   make vllm-table  the same, and write the table in docs/vllm.md
#   make lint     ruff and pyright alone
#   make browser  a Chromium for the tests of pages, where there is none and it may be installed
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

.PHONY: demo test test-vllm vllm-table check lint browser bench examples families clean

demo: $(VENV)/.demo
	$(BIN)/nnsight demo

test: $(VENV)/.dev browser
	$(BIN)/pytest $(PYTEST_ARGS)

test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest tests/vllm -W default $(PYTEST_ARGS)

vllm-table: .venv-vllm/.ready
	NNSIGHT_VLLM_TABLE=docs/vllm.md .venv-vllm/bin/python -m pytest tests/vllm -W default

check: lint test

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

browser:
	@command -v chromium google-chrome chromium-browser >/dev/null && exit; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing chromium"; \
		apt-get install -y -qq chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; }; \
	fi; \
	command -v chromium google-chrome chromium-browser >/dev/null || echo "no browser: tests of pages will be skipped" >&2

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
	rm -rf $(VENV) .venv-vllm build dist htmlcov .coverage .hypothesis .pytest_cache .ruff_cache
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

# vLLM has builds for Python 3.11 that match the pinned torch; where there is none, there is nothing to test.
.venv-vllm/.ready: constraints-vllm.txt pyproject.toml
	@echo "installing vLLM into .venv-vllm"
	@python3.11 -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-vllm.txt
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# The pins are of releases for Python 3.11 and newer; 3.10 takes the newest releases it has.
comma := ,
define install
@echo "installing nnsight[$(1)] into $(VENV)"
@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(1)]' \
	$$($(BIN)/python -c 'import sys; print("--constraint=constraints.txt" if sys.version_info >= (3, 11) else "")')
endef
