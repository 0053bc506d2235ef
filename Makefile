PYTHON ?= python3
BIN := .venv/bin

demo: .venv/run
	$(BIN)/python simclr.py
	$(BIN)/python eval_linear.py --backbone random:runs/simclr/backbone.pt --mode logreg
	$(BIN)/python eval_linear.py --backbone runs/simclr/backbone.pt --mode logreg

# two processes of one thread each are the fastest on the two cores of CI
test: .venv/dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: test
	$(BIN)/python -m pytest -m slow tests tests/mutants.py

lint: .venv/dev
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: requirements.txt requirements-dev.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo test test-all lint
