# `make demo` and `make test` need nothing but Python 3.11+, git and make.
PYTHON ?= python3
VENV ?= .venv
# The versions the suite last passed with. `make CONSTRAINTS=` takes the newest allowed instead.
CONSTRAINTS ?= -c constraints.txt
BIN := $(VENV)/bin

.PHONY: demo test lint format docs notebook clean

# One stamp for the environment: made again only when what it is made from changes.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/dfq demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Into build/site; a warning, such as a link that leads nowhere, is an error (with --quiet it would not be).
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Runs the tutorial and keeps what its cells give.
notebook: $(VENV)/.installed
	$(BIN)/python tools/refresh_notebook.py

clean:
	rm -rf $(VENV) build dist *.egg-info
