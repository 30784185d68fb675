# Tidegate's targets. Each works in a fresh clone with make, bash and Python 3.11+; `make help` lists them.
# A stamp file in each environment makes second runs quick; a changed pyproject.toml or constraints file reinstalls.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PY := .venv/bin/python
# Two workers, a file of tests to each at a time; PYTEST_ARGS is added.
PYTEST := $(PY) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)
DEMO := .venv/.demo-installed
DEV := .venv/.dev-installed
CLIENTS := .venv-clients/.installed
DRIFT_PEERS := .venv-drift-peers/.installed
# A copy of the packages with the request path compiled, as a wheel has it. Found first by whatever runs with AS_WHEEL;
# where it cannot be made (no C compiler), the source is.
COMPILED := build/.compiled
PRODUCT := $(shell find server router monitor -name '*.py')
AS_WHEEL := PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/compiled:$(CURDIR)
# Where the tests that pass through the compiled modules are.
THROUGH_COMPILED := tests/faults tests/integration tests/unit/batching tests/unit/codec tests/unit/transport \
	tests/unit/test_gateway.py tests/unit/test_gateway_policy.py tests/unit/monitor/test_tap.py --ignore-glob='*_kill.py' --ignore-glob='*_disk.py' \
	--ignore-glob='*/test_offline_serving.py' --ignore-glob='*/test_mlflow*.py' --ignore-glob='*/test_demo.py'
# The kernels of the drift monitor go into the cache on disk before there are tests that wait for servers that start.
KERNELS := $(PY) -c "from monitor.engine import MonitorSet; MonitorSet.compile()"
SOURCES := server router monitor tests loadtests scripts

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

# --- environments ---

# An environment whose interpreter is gone or replaced (a system upgrade), or is not the one that PYTHON names, is made
# again. PYTHON is handed on here because make before 4.4 does not.
kept = $(shell PYTHON='$(PYTHON)' bash scripts/venv.sh $(1) && echo kept)
ifeq ($(call kept,.venv),)
$(DEMO) $(DEV): gone
endif
ifeq ($(call kept,.venv-clients),)
$(CLIENTS): gone
endif
.PHONY: gone
gone:

# In an environment for development the product stays editable; else it is what users get, compiled, and again after an
# edit.
$(DEMO): pyproject.toml constraints.txt $(if $(wildcard $(DEV)),,$(PRODUCT))
	@echo "== set-up: .venv with what the demo needs (the first time: two minutes or more, downloads about 350 MB)"
	@bash scripts/venv.sh .venv -c constraints.txt $$([ ! -e $(DEV) ] || echo -e) '.[demo]'
	@touch $@

$(DEV): pyproject.toml constraints.txt
	@echo "== set-up: .venv with what development and tests need (the first time: a minute or more, downloads about 350 MB)"
	@bash scripts/venv.sh .venv -c constraints.txt -e '.[dev]'
	@touch $@ $(DEMO)

$(COMPILED): $(DEV) $(PRODUCT) scripts/compiling.py
	@echo "== compiling the request path into build/compiled (about a minute and a half)"
	@mkdir -p build && rm -rf build/compiled
	@$(PY) -m scripts.compiling build/compiled || echo "== left uncompiled: what follows runs the source"
	@touch $@

$(CLIENTS): requirements-clients.txt constraints-clients.txt
	@echo "== set-up: .venv-clients with the public Triton client, kept apart from ours"
	@bash scripts/venv.sh .venv-clients -c constraints-clients.txt -r requirements-clients.txt
	@touch $@

# --- the main job ---

.PHONY: demo
demo: $(DEMO) $(CLIENTS) ## real models on real data: served, checked, watched, retrained, rolled out and back
	@echo "== demo"
	@.venv/bin/tidegate demo

# --- tests ---

.PHONY: test
test: $(DEV) $(CLIENTS) ## all tests but the slow and the GPU ones
	@echo "== tests (without slow and gpu)"
	@$(KERNELS)
	@$(PYTEST) -m "not slow and not gpu"

.PHONY: test-compiled
test-compiled: $(COMPILED) $(CLIENTS) ## the tests that pass through the compiled request path, on it
	@echo "== tests, compiled"
	@$(AS_WHEEL) $(KERNELS)
	@$(AS_WHEEL) $(PYTEST) -o pythonpath= -m "not slow and not gpu" $(THROUGH_COMPILED)

.PHONY: test-slow
test-slow: $(COMPILED) $(CLIENTS) ## the slow tests, on the compiled request path
	@echo "== slow tests"
	@$(AS_WHEEL) $(KERNELS)
	@$(AS_WHEEL) $(PYTEST) -o pythonpath= -m "slow and not gpu"

.PHONY: test-gpu
test-gpu: $(DEV) $(CLIENTS) ## the tests that need a CUDA device
	@echo "== GPU tests"
	@$(PYTEST) -m gpu

# --- checks ---

.PHONY: check format lint types imports proto-fresh
check: format lint types imports proto-fresh ## format, lint, types, import contracts, freshness of generated code
	@echo "== all checks passed"

format: $(DEV)
	@echo "== format"
	@$(PY) -m ruff format --check $(SOURCES)

lint: $(DEV)
	@echo "== lint"
	@$(PY) -m ruff check $(SOURCES)

types: $(DEV)
	@echo "== types"
	@$(PY) -m mypy

imports: $(DEV)
	@echo "== import contracts"
	@.venv/bin/lint-imports --no-logo

proto-fresh: $(DEV)
	@echo "== generated code is fresh"
	@$(PY) scripts/proto.py --check
	@$(PY) -m scripts.config_reference --check

# --- tools ---

.PHONY: fmt proto compiled bench bench-quick bench-peers bench-drift reference constraints clean
fmt: $(DEV) ## format and mend what can be mended by itself
	@echo "== formatting"
	@$(PY) -m ruff format $(SOURCES)
	@$(PY) -m ruff check --fix $(SOURCES)

proto: $(DEV) ## generate the protobuf code again
	@echo "== generating protobuf code"
	@$(PY) scripts/proto.py

reference: $(DEV) ## write docs/configuration.md anew
	@$(PY) -m scripts.config_reference

compiled: $(COMPILED) ## the request path compiled, in build/compiled

bench: $(COMPILED) ## cost per request beside the usual stacks and floors (under 10 minutes)
	@echo "== bench"
	@$(PY) -m loadtests.bench $(BENCH)

bench-quick: $(COMPILED) ## the same, shorter and less sure (under 2 minutes)
	@echo "== bench, quick"
	@$(PY) -m loadtests.bench --quick $(BENCH)

bench-peers: $(COMPILED) ## other model servers beside ours (under 10 minutes after the set-up)
	@echo "== bench, peers"
	@$(PY) -m loadtests.peers $(BENCH)

$(DRIFT_PEERS): loadtests/requirements-drift-peers.txt
	@echo "== set-up: .venv-drift-peers with other drift monitors (about 400 MB)"
	@bash scripts/venv.sh .venv-drift-peers -r $<
	@touch $@

bench-drift: $(DEV) $(DRIFT_PEERS) ## drift statistics beside other libraries and a plain copy
	@echo "== bench, drift"
	@$(PY) -m loadtests.drift_figures $(BENCH)

constraints: ## resolve all versions anew and write the constraints files
	@echo "== resolving"
	@bash scripts/constraints.sh

clean: ## remove environments, caches and what the demo and the benchmarks left
	@echo "== clean"
	@rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@rm -rf tidegate-state demo-state loadtests/results
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
