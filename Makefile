# `make check` is the whole loop of a change; everything runs in .venv, which is made where it is missing.
BIN := .venv/bin
SOURCES := engine retention_tui tests docs

.PHONY: check lint types imports test format lock demo bench clean

check: lint types imports test

# The stamp is newer than pyproject.toml when the environment is up to date.
.venv/.installed: pyproject.toml
	test -x $(BIN)/python || python3 -m venv .venv
	$(BIN)/pip install --quiet -e '.[test]'
	touch $@

lint: .venv/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: .venv/.installed
	$(BIN)/mypy

imports: .venv/.installed
	$(BIN)/lint-imports

# These tools have run already; the tests that run them again are for `pytest` alone.
TOOLS := lint format types imports
test: .venv/.installed
	$(BIN)/pytest -n 2 $(TOOLS:%=--deselect tests/test_architecture.py::test_%)

format: .venv/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The public index by name, so that the lock never carries the addresses of one machine's mirror.
lock:
	uv lock --no-config --default-index https://pypi.org/simple

demo: .venv/.installed
	$(BIN)/retention-tui run demo

bench: .venv/.installed
	for script in tests/benchmarks/*.py; do $(BIN)/python "$$script"; done

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
