# make demo and make test need Python >= 3.11 and nothing else; each creates .venv on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench soak clean

demo: .venv/installed
	$(BIN)/vse demo

test: check
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	for name in loss evaluation sampler; do OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name || exit 1; done

soak: .venv/installed
	$(BIN)/python -m pytest -m soak -rP
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --json docs/serving/soak.json

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv demo runs
