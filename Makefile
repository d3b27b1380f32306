# Set-up, tests and checks. Needs Python >= 3.11 and make (3.81, as macOS ships it, is enough).
# The first run creates .venv, with uv if it is on PATH, else with venv and pip; it is renewed when pyproject.toml changes.

VENV := .venv
PYTHON ?=# the Python to make .venv with; empty: the first suitable one
MODEL ?= demo/model# model folder for `make bench-model`
PYTEST_ARGS ?=# for example PYTEST_ARGS="-k rope -x"; with make bench, PYTEST_ARGS=--benchmark-compare for the last run

# The parity tests' reference. On Linux the default index has CUDA builds of several GB; for the CPU build:
# make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

UV := $(shell command -v uv 2>/dev/null)
INSTALL = $(if $(UV),$(UV) pip install --python $(VENV)/bin/python,$(VENV)/bin/python -m pip install --disable-pip-version-check)

# MLX's CPU wheel for Linux brings the slow reference BLAS; an installed OpenBLAS takes its place in a process.
OPENBLAS := $(firstword $(wildcard $(foreach d,/usr/lib/$(shell uname -m)-linux-gnu /usr/lib64 /usr/lib,$(d)/libopenblas.so.0)))
WITH_OPENBLAS = $(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS) OPENBLAS_NUM_THREADS=1)
# Tests start many processes; where bytecode is not written, each compiles all modules again, half a second of work.
PYTEST = PYTHONDONTWRITEBYTECODE= $(WITH_OPENBLAS) $(VENV)/bin/python -m pytest

.NOTPARALLEL:
.PHONY: help demo test check bench bench-model bench-convert bench-quality test-fullsize test-fuzz test-prompts test-thorough clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-14s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.runtime ## the whole chain on an embedded tiny model, into demo/: convert, quantize, generate, bench
	$(VENV)/bin/ltx2 demo demo

test: $(VENV)/.test ## all tests, those against the reference implementations included
	LTX2_REQUIRE_PARITY=1 $(PYTEST) -n auto --dist worksteal $(PYTEST_ARGS)

check: $(VENV)/.check ## linter, types, architecture
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(PYTEST) -q tests/test_architecture.py

bench: $(VENV)/.test ## speed of single functions, kept in .benchmarks; PYTEST_ARGS=--benchmark-compare: against the run before
	$(PYTEST) -m speed tests/bench_hot.py --benchmark-autosave --benchmark-columns=median,iqr,rounds $(PYTEST_ARGS)

bench-model: $(VENV)/.runtime ## time and memory of MODEL=folder, phase by phase (default: the demo model)
	@test -d $(MODEL) || { echo "$(MODEL) is missing: run 'make demo' first, or name a folder: make bench-model MODEL=..." >&2; exit 1; }
	$(VENV)/bin/ltx2 bench $(MODEL)

bench-convert: $(VENV)/.runtime ## convert beside cp, on 5 GB of random weights in build/ (needs 15 GB there)
	$(VENV)/bin/python -m ltx2.bench.convert --out build/bench-convert.json

bench-quality: $(VENV)/.plot ## what quantizing costs the demo model, beside mx.quantize: 64 prompts, half an hour on 2 cores, into build/
	$(WITH_OPENBLAS) $(VENV)/bin/python -m ltx2.bench.quality.demo_quality --out build/demo-quality.json --plot build/demo-quality.png

test-fullsize: $(VENV)/.test ## full-size checks with random weights; needs a GPU
	$(PYTEST) -m fullsize $(PYTEST_ARGS)

test-fuzz: $(VENV)/.test ## hostile files, for some twenty minutes; other ones each time
	$(PYTEST) -m fuzz $(PYTEST_ARGS)

test-prompts: $(VENV)/.test ## dozens of prompts through the demo models at 32, 8 and 4 bits; some forty minutes
	$(PYTEST) -m prompts $(PYTEST_ARGS)

test-thorough: $(VENV)/.test ## what the other tests try on few cases or small ones, in full
	$(PYTEST) -m thorough $(PYTEST_ARGS)

clean: ## remove .venv, caches, builds and demo/ (never weights/)
	rm -rf $(VENV) build dist ltx2.egg-info demo .benchmarks .pytest_cache .mypy_cache .ruff_cache
	find ltx2 convert runtime quant bench tests -name __pycache__ -prune -exec rm -rf {} +

# Stamps: what .venv holds.

$(VENV)/.runtime: pyproject.toml $(VENV)/.created
	$(INSTALL) -e .
	@touch $@

$(VENV)/.plot: $(VENV)/.runtime
	$(INSTALL) -e '.[plot]'
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.created
	$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(INSTALL) -e '.[test,parity]'
	@touch $(VENV)/.runtime $@

$(VENV)/.check: $(VENV)/.test
	$(INSTALL) -e '.[test,parity,dev]'
	@touch $@

$(VENV)/.created:
	@PYTHON="$(PYTHON)" .ci/venv $(VENV)
	@touch $@
