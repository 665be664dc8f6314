# The verbs of this project. Each one is complete: it makes .venv and installs what it needs.
#
#   make run                prune the bundled demo model; MODEL=, METHOD=, SPARSITY=, PATTERN=, DTYPE=, OUT= change the job
#   make test               the whole suite, offline
#   make lint               ruff, mypy
#   make bench              speed, memory and quality; writes the table of the README

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

MODEL ?= demo
METHOD ?= sparsegpt
SPARSITY ?= 0.5
PATTERN ?= unstructured
# Half precision is emulated on most CPUs, many times slower than fp32.
DTYPE ?= $(if $(shell nvidia-smi -L 2>/dev/null),auto,float32)
OUT ?= runs/$(notdir $(MODEL))-$(METHOD)-$(if $(filter unstructured,$(PATTERN)),$(SPARSITY),$(subst :,-,$(PATTERN)))
ARGS ?=

.PHONY: run test lint format bench bench-quick lock clean

run: $(READY)
	@$(if $(filter file,$(origin OUT)),rm -rf "$(OUT)" "$(OUT).work") # a named OUT is the user's own
	@$(BIN)/llmprune prune "$(MODEL)" --out "$(OUT)" --method $(METHOD) --pattern $(PATTERN) \
		$(if $(filter unstructured,$(PATTERN)),--sparsity $(SPARSITY)) --dtype $(DTYPE) $(ARGS)

test: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow" $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

lock: $(READY)
	$(BIN)/python scripts/lock.py

clean:
	rm -rf $(VENV) runs build dist *.egg-info

# The environment: made once, made again when what it is made from changes.
$(READY): pyproject.toml requirements.lock scripts/setup.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/setup.sh
	@touch $@
