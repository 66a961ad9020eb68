# Every target that needs packages makes .venv first (setup.sh; nothing happens when it is up to date).
PY := .venv/bin/python
PIPELINE ?= ffcv
SIZE ?= small
SECONDS ?= 7200
# Each test process holds about 1 GB and runs one torch thread.
WORKERS ?= $(shell n=$$(nproc); [ $$n -gt 8 ] && n=8; echo $$n)
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(PY) -m pytest -rs --durations=12 -n $(WORKERS) --dist worksteal

.PHONY: help setup demo demo-detection evidence test check lint configs soak bench gpu kit clean
help:
	@echo "make demo [FAST=1] [PIPELINE=ffcv|dali|reference]   vanilla training and Fast AdvProp on real images: cost, accuracy,"
	@echo "              figures, a verdict; 10 to 15 minutes on 2 cores after set-up, FAST=1 under 2"
	@echo "make demo-detection [FAST=1] [PIPELINE=...]   the same two methods on a small detector; under 10 minutes"
	@echo "make test     the tests (with a GPU: the GPU tests too)"
	@echo "make check    lint, types, quick tests              make configs  write configs/ from its table"
	@echo "make evidence [SIZE=small|full] [SECONDS=7200]   where Fast AdvProp pays, and how much: methods over several seeds (docs/evidence.md)"
	@echo "make bench    speed of conversion, loaders and steps       make soak   hours of stress"
	@echo "make gpu [SECONDS=7200]   on a GPU machine: tests, speed, profile, study, and a table of them (bench/gpu/README.md)"
	@echo "make kit      what a GPU machine without a network lacks, see bench/gpu/README.md"
	@echo "make setup    only the environment in .venv                make clean  remove caches and build products"

setup:
	@bash setup.sh

demo: setup
	$(PY) -m bench.demo --pipeline $(PIPELINE) $(if $(filter-out 0,$(FAST)),--fast)

demo-detection: setup
	$(PY) -m bench.demo_detection --pipeline $(PIPELINE) $(if $(filter-out 0,$(FAST)),--fast)

test: setup
	$(PYTEST) -m "not gpu and not soak"
	@if nvidia-smi -L >/dev/null 2>&1; then echo "GPU tests:"; $(PY) -m pytest -v -rs -m "gpu and not soak"; \
	else echo "no GPU: tests marked gpu were not run"; fi

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy fap pipelines

check: lint
	$(PYTEST) -m "not slow and not gpu and not soak"

configs: setup
	$(PY) -m configs.make

soak: setup
	$(PY) -m pytest -v -rs -m soak

evidence: setup
	$(PY) -m bench.evidence --size $(SIZE) --seconds $(SECONDS)

bench: setup
	$(PY) -m bench.convert
	$(PY) -m bench.loaders
	$(PY) -m bench.cost_parity

gpu: setup
	$(PY) -m bench.gpu.suite --seconds $(SECONDS)

kit: setup
	$(PY) -m bench.gpu.build_kit

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fap pipelines configs bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
