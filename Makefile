# `make demo` and `make test` do their own set-up in .venv; nothing else is needed than Python >= 3.11, make and a C compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUTPUT ?= demo-output
WEIGHTS := checkpoints/asag-a-tiny.safetensors

.PHONY: demo test lint types install clean
.DEFAULT_GOAL := help

help:
	@echo "make demo                 train, export, build, compare: the whole way on a small dataset (about 2 minutes)"
	@echo "make demo FROM_SCRATCH=1  the same, training from nothing instead of from $(WEIGHTS)"
	@echo "make test                 lint, types and all tests"
	@echo "make install              only the set-up, into $(VENV)"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("asag needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[train,runtime,dev]'
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[tensorrt-rtx]' \
		|| echo "TensorRT-RTX does not install on this machine; its rows in tables will say so"
	@touch $@

demo: install
	$(BIN)/asag demo --output $(OUTPUT) $(if $(FROM_SCRATCH),,--weights $(WEIGHTS))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

test: lint types
	$(BIN)/pytest -n 2 --dist loadfile -q --durations=25

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
