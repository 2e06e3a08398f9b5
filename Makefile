# Every verb of the repository. CI calls these and nothing else.
# A machine needs Python 3.11 or newer, git and make; each verb sets up .venv by itself.

PYTHON ?= python3
BIN := .venv/bin
CODE := pglpipe benchmarks examples tests
# One thread per process: equal runs give equal numbers, and workers do not fight over cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Several tests at a time, but those that start workers, and look at the clock, one by one.
ABREAST := -n auto --maxprocesses 4 --dist loadgroup --durations 10

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu check format bench bench-full bench-emulated bench-gpu bench-links bench-memory clean

help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

demo: .venv/installed  ## train a small pipeline on synthetic data and show what it learned
	@$(BIN)/python -m benchmarks.study.demo

test: .venv/installed  ## run the tests, without the slow ones and those for a GPU; ends with the ten slowest
	@$(PYTEST) $(ABREAST)

test-slow: .venv/installed  ## run the slow tests alone
	@$(PYTEST) -m slow

test-gpu: .venv/installed  ## run the tests that need a CUDA device
	@$(PYTEST) -m gpu

check: .venv/installed  ## formatting, style and types; writes nothing
	@$(BIN)/black --check $(CODE)
	@$(BIN)/isort --check-only $(CODE)
	@$(BIN)/flake8 $(CODE)
	@$(BIN)/mypy

format: .venv/installed  ## rewrite the code as check wants it
	@$(BIN)/isort $(CODE)
	@$(BIN)/black $(CODE)

bench: .venv/installed  ## measure throughput and memory beside the alternatives, in under 10 minutes
	@$(BIN)/python -m benchmarks.race.throughput

bench-full: .venv/installed  ## the same with more rounds, longer bursts, all on four workers; then emulated devices
	@$(BIN)/python -m benchmarks.race.throughput --full
	@$(BIN)/python -m benchmarks.race.emulated

bench-emulated: .venv/installed  ## 8 and 16 workers on emulated devices, beside what arithmetic allows
	@$(BIN)/python -m benchmarks.race.emulated

bench-gpu: .venv/installed  ## stages in turns and side by side on one GPU, beside end to end
	@$(BIN)/python -m benchmarks.gpu

bench-links: .venv/installed  ## the same over slow links between two network namespaces; needs root
	@$(BIN)/python -m benchmarks.links

bench-memory: .venv/installed  ## what each way to train keeps for backward, counted
	@$(BIN)/python -m benchmarks.memory

clean:  ## remove .venv, caches, build outputs and what the verbs left in runs/
	rm -rf .venv .pytest_cache .mypy_cache build dist *.egg-info
	rm -rf runs/demo runs/bench runs/slow-links runs/soak runs/transports runs/prediction
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# The stamp is younger than what it was made from, or the environment is brought up to date.
.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	@touch $@
