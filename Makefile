# hyperadapt_jax: `make` lists what there is. Needs Python 3.11 or newer, pip and make.

VENV  ?= .venv
TESTS ?=
WORKERS ?= 2
BENCH ?= tests.benchmarks.step_cost tests.benchmarks.trace_time tests.benchmarks.loss_chunk

bin   := $(VENV)/bin
pyenv := $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/*/bin/python3)

# $(call interpreters,candidates,lowest,below): those that run, can make an environment and whose
# sys.hexversion lies in [lowest, below). Shims and broken installations drop out.
interpreters = $(foreach python,$(1),$(shell $(python) -c 'import sys, venv; \
	print(sys.executable if $(2) <= sys.hexversion < $(3) else "")' 2>/dev/null))

have_python = test -n "$(PYTHON)" || { \
	echo 'No Python 3.11 or newer with the venv module was found. Install one, or name it:' \
	'make PYTHON=/path/to/python3' >&2; exit 1; }

supported = $(call interpreters,python3.11 python3.12 python3.13 python3.14 python3 $(pyenv),\
	0x030b0000,0x04000000)
PYTHON   ?= $(firstword $(supported))

# Tests never reach for the network or for an accelerator.
offline := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 JAX_PLATFORMS=cpu
PYTEST  := $(offline) $(bin)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo test parity lowest bench lint other-python clean
.DELETE_ON_ERROR:

help: ## print this list
	@echo 'make TARGET [PYTHON=python3.13] [VENV=.venv] [TESTS=tests/core] [WORKERS=2] [DEMO=OPTIONS] [BENCH=MODULE]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.ready-train ## set up .venv and adapt an embedded model to a new task, in about two minutes
	HF_HUB_OFFLINE=1 $(bin)/python -m train demo --folder runs/demo-$$(date +%Y%m%d-%H%M%S) $(DEMO)

test: $(VENV)/.ready ## set up .venv and run the whole suite offline, or TESTS; no torch
	$(PYTEST) $(TESTS)

parity: $(VENV)/.ready-torch ## add torch to .venv and compare with it live
	$(PYTEST) tests/parity

# The lowest version of everything: pyproject.toml's own bounds, read as "exactly".
lowest: ## run the suite, or TESTS, on the lowest versions that pyproject.toml allows
	grep -oE '"[a-z-]+>=[0-9.]+"' pyproject.toml | tr -d '"' | sed 's/>=/==/' | sort -u \
	  > .venv-lowest.txt
	PIP_CONSTRAINT=$(CURDIR)/.venv-lowest.txt $(MAKE) test VENV=.venv-lowest

bench: $(VENV)/.ready-bench ## measure speed and memory against other adapters
	set -e; for script in $(BENCH); do $(bin)/python -m $$script; done

lint: $(VENV)/.ready ## check the code's style and types
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy

other-python: $(VENV)/.ready
	@$(bin)/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' \
	  && echo $(firstword $(call interpreters,python3.11 $(pyenv),0x030b0000,0x030c0000)) \
	  || echo $(lastword $(call interpreters,python3.12 python3.13 $(pyenv),0x030c0000,0x04000000))

clean: ## remove the environments and everything that was built
	rm -rf .venv .venv-next .venv-lowest .venv-lowest.txt build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A change of the requirements builds the environment anew.
$(VENV)/.ready: pyproject.toml
	@$(have_python)
	$(PYTHON) -m venv $(if $(wildcard $@),--clear) $(VENV)
	$(bin)/python -m pip install --quiet --editable '.[test]'
	touch $@

# What the command line needs and no more; `make test` then adds to the same environment.
$(VENV)/.ready-train: pyproject.toml
	@$(have_python)
	test -e $(VENV)/.ready || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --editable '.[train,plot]'
	touch $@

$(VENV)/.ready-torch: $(VENV)/.ready
	$(bin)/python -m pip install --quiet --editable '.[torch]'
	touch $@

$(VENV)/.ready-bench: $(VENV)/.ready
	$(bin)/python -m pip install --quiet --editable '.[bench]'
	touch $@
