# make train, make test, make test-gpu: each sets everything up first. PYTHON=python3.12 make train picks another Python.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-gpu doctor faults bench check format clean

train: .venv/ready
	$(BIN)/python train.py attn=gqa pos=rope minutes=1.5

test: .venv/tested
	$(BIN)/python -m pytest

test-gpu: .venv/tested
	$(BIN)/python -m pytest -n0 tests/cuda/on_device.py

doctor: .venv/ready
	$(BIN)/python -m cli.doctor

faults: .venv/ready
	$(BIN)/python tests/faults/campaign.py
	$(BIN)/python tests/faults/mutations.py

bench: .venv/tested
	$(BIN)/python -m bench.step_time

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv outputs/runs outputs/sweeps outputs/cache

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

.venv/tested: .venv/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,peers,harness]"
	@touch $@
