# The same commands a person and continuous integration run.
PY ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
export NUMBA_CACHE_DIR ?= $(CURDIR)/.cache/numba
export HF_HUB_OFFLINE := 1

.PHONY: setup demo test test-all check format base-model draft-module gpu clean

setup: .venv/.ok

.venv/.ok: pyproject.toml constraints.txt
	$(PY) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"longforge needs Python 3.11 to 3.13, and $(PY) is {v[0]}.{v[1]}: say make PY=python3.12")'
	$(PY) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# Into the user's own cache, so that the first `longforge serve` starts at once; what it finds stops nothing.
	-env -u NUMBA_CACHE_DIR $(BIN)/longforge doctor --compile
	touch $@

demo: setup
	$(BIN)/longforge forge run src/longforge/forge/configs/demo.toml --out runs/demo --replace

test: setup
	$(BIN)/python -m pytest -m 'not slow and not gpu'

test-all: setup
	$(BIN)/python -m pytest -m 'not gpu'

check: setup
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/pyright
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format src tests scripts benchmarks
	$(BIN)/ruff check --fix src tests scripts benchmarks

base-model: setup
	$(BIN)/python scripts/base_model.py

draft-module: setup
	$(BIN)/python scripts/draft_module.py

# For a machine with a CUDA device and its own Python packages: runs the tree from src/, installs nothing. The tests
# first, then the benchmarks of the engine and of attention, which end with short tables; together under ten minutes.
OUT ?= runs/gpu
gpu:
	mkdir -p $(OUT)
	PYTHONPATH=src timeout 270 $(PY) -m pytest -m gpu tests/gpu tests/kernels --junitxml=$(OUT)/gpu.xml
	PYTHONPATH=src timeout 120 $(PY) benchmarks/engine_gpu.py --seconds 100 --out $(OUT)/engine.json
	PYTHONPATH=src timeout 200 $(PY) -m longforge.bench attention --device cuda --minutes 2 --out $(OUT)/attention.json

clean:
	rm -rf .venv .cache build dist
