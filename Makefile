# What a clone needs is Python 3.11 or newer and nothing else: each target makes the environment it wants first.
# Another Python: make test PYTHON=python3.12

VENV    ?= .venv
PEERS   ?= .venv-peers
WORKERS ?= 2
DEMO    ?=
PYTEST  ?=
BENCH   ?=

# The first of these that is new enough. A name may exist and not work, so each is tried.
PYTHON  ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
             $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help venv install demo test test-peers lint format schema bench bench-peers clean

help: ## say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

# --- environments: a stamp is newer than pyproject.toml when what it stands for is installed ---------------------

define make_venv
	@if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "Millrace needs Python 3.11 or newer$(if $(PYTHON),$(comma) and '$(PYTHON)' is not that,$(comma) and none was found)." \
	       "Name one, like this: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.11" >&2; exit 2; fi
	@test -x $(1)/bin/python || "$(PYTHON)" -m venv $(1) || { \
	  rm -rf $(1); echo "'$(PYTHON)' can't make a virtual environment: it lacks venv or ensurepip." >&2; exit 2; }
endef
comma := ,

$(VENV)/.core: pyproject.toml
	$(call make_venv,$(VENV))
	$(BIN)/python $(PIP) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml
	$(call make_venv,$(VENV))
	$(BIN)/python $(PIP) -e '.[dev]'
	@touch $(VENV)/.core $@

# The libraries that exports are for. torch comes first and is held: what comes after must live with it.
$(PEERS)/.ready: pyproject.toml bench/peers/torch.txt
	$(call make_venv,$(PEERS))
	$(PEERS)/bin/python $(PIP) torch==2.13.0
	$(PEERS)/bin/python $(PIP) -r bench/peers/torch.txt
	$(PEERS)/bin/python $(PIP) -e . pytest pytest-timeout
	@touch $@

# Peers of the benchmarks that don't live with those, nor with each other.
$(PEERS)2/.ready: bench/peers/grain.txt
	$(call make_venv,$(PEERS)2)
	$(PEERS)2/bin/python $(PIP) -r $<
	@touch $@

$(PEERS)3/.ready: bench/peers/ray.txt
	$(call make_venv,$(PEERS)3)
	$(PEERS)3/bin/python $(PIP) -r $<
	@touch $@

venv: $(VENV)/.core ## an environment with Millrace in it: .venv/bin/millrace
install: $(VENV)/.dev ## the same, with all that tests and lint need

# --- work -----------------------------------------------------------------------------------------------------------

demo: $(VENV)/.core ## four local clouds, one of them lost, nothing lost
	@$(BIN)/millrace demo $(DEMO)

test: $(VENV)/.dev ## every test but those that need other libraries; PYTEST='-k placement' for some
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --hypothesis-seed=0 -m "not peers" $(PYTEST)

test-peers: $(PEERS)/.ready ## exports, opened by the libraries they are for
	@$(PEERS)/bin/python -m pytest tests/peers $(PYTEST)

lint: $(VENV)/.dev ## ruff, mypy, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(VENV)/.core ## publish the JSON schemas under docs/schema
	@mkdir -p docs/schema
	$(BIN)/millrace schema world > docs/schema/world.json
	$(BIN)/millrace schema pipeline > docs/schema/pipeline.json

bench-peers: $(PEERS)/.ready $(PEERS)2/.ready $(PEERS)3/.ready ## the tools that bench sets beside Millrace

bench: $(VENV)/.dev ## the tables of docs/benchmarks.md, with those peers that are installed; BENCH='--help' for more
	@$(BIN)/python -m bench $(BENCH)

clean: ## take away what the other targets made, environments included
	rm -rf $(VENV) $(PEERS) $(PEERS)2 $(PEERS)3 build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests bench examples -name __pycache__ -prune -exec rm -rf {} +
