# Works from a fresh clone with Python 3.11 or later and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export MLX_ENABLE_TF32 := 0

.PHONY: help demo test soak lint format parity bench clean

help:
	@echo "make demo     see everything once (pulls 93 MB, takes a few minutes)"
	@echo "make test     the tests, under twelve minutes on two cores"
	@echo "make soak     the longer ones too"
	@echo "make lint     ruff and mypy"
	@echo "make bench    speed and memory beside mlx-lm and PyTorch, into benchmarks/results; an hour or two on two cores"
	@echo "make parity   SmolLM2 against transformers, figures into benchmarks/results"

demo: $(VENV)/base
	$(BIN)/minimac-mlx demo

test: $(VENV)/test
	$(BIN)/python -m pytest -m "not soak"

soak: $(VENV)/test
	$(BIN)/python -m pytest

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

parity: $(VENV)/test
	$(BIN)/minimac-mlx pull
	$(BIN)/python -m benchmarks.parity

# BENCH_DATA=DIR: a folder of NAME/train.txt to train on, else Python's reference.
bench: $(VENV)/test
	$(BIN)/minimac-mlx pull
	$(BIN)/minimac-mlx bench all --out benchmarks/results $(if $(BENCH_DATA),--data $(BENCH_DATA))
	$(BIN)/python -m benchmarks.predictions

clean:
	rm -rf $(VENV) build *.egg-info

# A stamp for each set of packages; they are installed again when pyproject.toml changes.
$(VENV)/base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/test: $(VENV)/base
	$(BIN)/python -m pip install --quiet -e '.[test]'
	@touch $@

$(VENV)/lint: $(VENV)/base
	$(BIN)/python -m pip install --quiet -e '.[lint]'
	@touch $@
