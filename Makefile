# `make install`, `make run` and `make test` need nothing but a Python from 3.11 to 3.14; GNU make 3.81 (macOS') is enough.

SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
SOURCES := supervisor worker tests examples bench
DEPENDENCIES := $(VENV)/.dependencies-installed
INSTALLED := $(VENV)/.project-installed

# The first of these that is new enough: macOS' own python3 is 3.9. Override with `make PYTHON=/path/to/python3.12`.
PYTHON ?= $(shell for one in python3 python3.13 python3.12 python3.14 python3.11; do \
	"$$one" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo "$$one" && break; done)

# A virtual environment holds absolute paths: one that was moved, or whose Python was removed, is made again.
ifneq ($(shell $(BIN)/python -c 'print(1)' 2>/dev/null)$(shell cat $(VENV)/.made-in 2>/dev/null),1$(CURDIR))
$(DEPENDENCIES): again
endif

.PHONY: help install run run-bare test test-core test-long check simulate simulate-bugs bench bench-leaks bench-worker lock clean again

help:
	@echo "make install    the environment in $(VENV), from the hash-pinned requirements.txt"
	@echo "make run        a first run with a fire drill: it leaks, trips, halves its batch, and finishes"
	@echo "make run-bare   the same drill without the supervisor: it dies"
	@echo "make test-core  the core's tests and a few simulator seeds; run it after every edit"
	@echo "make test       the default tests; make test-long the slow ones; make check ruff and mypy"
	@echo "make simulate   1,000 seeds of simulated worlds; SEEDS=10000 or SEEDS=7..99; SEED=42 replays one; simulate-bugs"
	@echo "make bench      what supervision costs, into bench/results; make bench-worker the worker's own figures"
	@echo "make clean      removes everything that make created"

install: $(INSTALLED)

$(DEPENDENCIES): requirements.txt
	@[ -n "$(PYTHON)" ] || { echo "mlx-supervisor needs Python 3.11 to 3.14; found: $$(python3 --version 2>&1 || true)." \
		"Install one (macOS: brew install python@3.13), or name it: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || { \
		echo "mlx-supervisor needs Python 3.11 to 3.14; $(PYTHON) is $$("$(PYTHON)" --version 2>&1)"; exit 1; }
	@[ "$$(uname -sm)" != "Darwin x86_64" ] || { \
		echo "MLX needs an Apple silicon Mac and a Python built for it; this one is for Intel"; exit 1; }
	rm -rf $(VENV)
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements.txt
	printf '%s' "$(CURDIR)" > $(VENV)/.made-in
	touch $@

# the build backend is pinned in requirements.txt too: nothing is fetched here
$(INSTALLED): $(DEPENDENCIES) pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-index --editable .
	touch $@

run: $(INSTALLED)
	$(BIN)/mlx-supervisor run examples/first-run.toml --fresh

# shows how the unsupervised run dies
run-bare: $(INSTALLED)
	-$(BIN)/mlx-supervisor run examples/first-run.toml --bare

# Most tests wait for processes, so twice as many test workers as cores (here two) are faster. More cores: WORKERS=8.
WORKERS ?= 4
test: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "not long" -n $(WORKERS) --dist worksteal --durations=10

# These tests compute and do not wait.
test-core: $(INSTALLED)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --hypothesis-profile=quick \
		tests/core "tests/simulation/test_simulation.py::test_seeds[0]"

# also runs ten times as many examples of each property
test-long: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "long or hypothesis" --hypothesis-profile=long

check: $(INSTALLED)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

# SEEDS=10000: the first 10,000; SEEDS=7..99: a range; SEED=42 replays one with its timeline (ALL=1: every line);
# with SEEDS, ALL=1 continues after a violation
SEEDS ?= 1000
simulate: $(INSTALLED)
	$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED),--seeds $(SEEDS)) $(if $(ALL),--all)

# how many seeds it takes to find each planted bug
simulate-bugs: $(INSTALLED)
	$(BIN)/python -m tests.simulation --bugs --seeds 1000

bench: $(INSTALLED)
	$(BIN)/python bench/footprint.py
	$(BIN)/python bench/overshoot.py
	$(BIN)/python bench/overhead.py
	$(BIN)/python bench/founding.py

# the breaker's accuracy on simulated traces; TRACES=FOLDER uses the traces of another generator
bench-leaks: $(INSTALLED)
	$(BIN)/python bench/leak_traces.py $(if $(TRACES),--traces $(TRACES))

# the worker: speed against mlx_lm, growth over 10,000 updates, checkpoints, restarts (about half an hour)
bench-worker: $(INSTALLED)
	$(BIN)/python bench/throughput.py
	$(BIN)/python bench/memory_growth.py
	$(BIN)/python bench/checkpoint_stall.py
	$(BIN)/python bench/restart.py
	$(BIN)/python bench/check_measure.py

# needs uv; Linux (x86-64, aarch64) and macOS (arm64), Python 3.11 to 3.14, and no index address in the file
lock:
	uv pip compile --quiet --universal --python-version 3.11 --upgrade --generate-hashes \
		--no-annotate --no-header --extra cpu --group dev --group build -o requirements.txt pyproject.toml

clean:
	rm -rf $(VENV) .venv-stock .venv-stock.lock build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis examples/.state
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
