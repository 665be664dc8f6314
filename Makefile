# The verbs of this project. Each one is complete: it makes .venv and installs what it needs.
#
#   make run                start the service, prune the bundled demo model through it, leave it up (ONCE=1: end after the job);
#                           MODEL=, METHOD=, SPARSITY=, PATTERN=, DTYPE=, OUT=, ARGS= change the job
#   make test               the whole suite, offline, in JOBS=3 processes: two cores, and one for those that wait
#                           (ARGS="-m slow": the kernels compiled for architectures other than sm_90)
#                           LLMPRUNE_SCREENSHOTS=DIR keeps pictures of the service's pages
#   make lint               ruff, mypy
#   make docs               the documentation site, into build/site: opens from the disk, loads nothing from elsewhere
#   make bench              speed, memory and packing; writes the tables of the README
#   make bench-quality      every method, combination and preset on the demo model and those of LLMPRUNE_BENCH_DATA (../shared): hours,
#                           goes on where it was stopped; ARGS="--models demo --targets 60% --variants wanda,alps --jobs 2 --limit 20",
#                           ARGS=--tables writes docs/quality.* again from the results, ARGS=--fresh measures all anew
#   make bench-structured   the same of the methods that make matrices smaller, and how much faster that is: an hour or more; its ARGS too
#   make bench-peers        llmprune beside llm-compressor, in an environment made for both: half an hour; ARGS="--repeats 5 --threads 2"
#   make bench-gpu          every kernel checked, then timed, on this machine's GPU; without one it says so
#   make bench-scale        what a walk costs beside a forward, how it grows, and that its memory does not: a quarter of an hour
#   make bench-scale-gpu    the walk on this machine's GPU: checked, then a Llama of 8 B random weights timed; without one it says so
#   make bench-service      the service under load, under random kills, and with a 3 GiB download

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_VENV ?= .venv-docs

MODEL ?= demo
METHOD ?= sparsegpt
SPARSITY ?= 0.5
PATTERN ?= unstructured
# Half precision is emulated on most CPUs, many times slower than fp32.
DTYPE ?= $(if $(shell nvidia-smi -L 2>/dev/null),auto,float32)
OUT ?= runs/$(notdir $(MODEL))-$(METHOD)-$(if $(filter unstructured,$(PATTERN)),$(SPARSITY),$(subst :,-,$(PATTERN)))
ONCE ?=
JOBS ?= 3
ARGS ?=

.PHONY: run test lint format bench bench-quality bench-structured bench-peers bench-gpu bench-scale bench-scale-gpu bench-service docs lock clean

# Data of the service that `make run` starts; a local model is allowed to be named by its jobs.
export LLMPRUNE_DATA_DIR ?= $(CURDIR)/runs/service
LOCAL := $(if $(wildcard $(MODEL)/config.json),$(realpath $(MODEL)))

run: $(READY)
	@$(if $(filter file,$(origin OUT)),rm -rf "$(OUT)") # a named OUT is the user's own
	@$(if $(LOCAL),LLMPRUNE_MODEL_ROOTS="$(LOCAL)") $(BIN)/llmprune quickstart "$(or $(LOCAL),$(MODEL))" --out "$(OUT)" \
		--method $(METHOD) --pattern $(PATTERN) $(if $(filter unstructured,$(PATTERN)),--sparsity $(SPARSITY)) \
		--dtype $(DTYPE) $(if $(ONCE),--once) $(ARGS)

# Bytecode is kept even where the environment says no: dozens of processes import llmprune, every one of them all the tests.
test: $(READY)
	PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow" --numprocesses $(JOBS) --dist loadgroup --no-loadscope-reorder $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

bench-quality: $(READY)
	$(BIN)/python -m benchmarks quality $(ARGS)

bench-structured: $(READY)
	$(BIN)/python -m benchmarks structured $(ARGS)

bench-peers: $(READY)
	$(BIN)/python -m benchmarks peers $(ARGS)

bench-gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu_kernels $(ARGS)

bench-scale: $(READY)
	$(BIN)/python -m benchmarks scale $(ARGS)

bench-scale-gpu: $(READY)
	$(BIN)/python -m benchmarks.scale_gpu $(ARGS)

bench-service: $(READY)
	$(BIN)/python -m benchmarks service $(ARGS)

# What the code says is written with the project's environment, the site with one of its own: tests need nothing of it.
docs: $(READY) $(DOCS_VENV)/.ready
	$(BIN)/python scripts/docs_source.py build/docs
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	@echo "Open build/site/index.html"

lock: $(READY)
	$(BIN)/python scripts/lock.py
	$(if $(wildcard $(DOCS_VENV)/.ready),$(DOCS_VENV)/bin/python scripts/lock.py docs)

clean:
	rm -rf $(VENV) $(DOCS_VENV) runs build dist *.egg-info

# The environment: made once, made again when what it is made from changes.
$(READY): pyproject.toml requirements.lock scripts/setup.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/setup.sh
	@touch $@

$(DOCS_VENV)/.ready: requirements-docs.lock
	@$(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check --quiet install -r requirements-docs.lock
	@touch $@
