# make demo and make test need Python >= 3.11 and nothing else; each creates .venv on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-arithmetic check bench soak clean

demo: .venv/installed
	$(BIN)/vse demo

test: check
	$(BIN)/python -m pytest

# Nothing that a test asserts may hang on how a processor rounds.
PYTEST := $(BIN)/python -m pytest -p tests.arithmetic
DRAWS_DENORMALS := tests/vse_app/test_schema.py
OTHER_PROCESS := tests/training/test_resume.py::test_a_killed_run_resumes_to_the_same_bits
test-arithmetic: .venv/installed
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST)
	OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 $(PYTEST)
	OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=ALL $(PYTEST)
	OMP_NUM_THREADS=1 $(PYTEST) --flush-denormals --deselect $(DRAWS_DENORMALS)
	OMP_NUM_THREADS=2 $(PYTEST) --other-bits 1 --deselect $(OTHER_PROCESS)

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
