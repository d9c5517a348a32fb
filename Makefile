# Every command of the project; `make help` lists them. Each sets up what it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo notebooks docs wheel test test-slow test-crashes test-oldest lint planted-bugs figures truth bench clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 16

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/.installed  ## train a small model on Python's own source: LLC over training, influences, susceptibilities (5 minutes)
	$(BIN)/python examples/training_run.py
	$(BIN)/python examples/code_and_prose.py

notebooks: .venv/.installed  ## execute the notebooks of examples/ in place (3 minutes)
	$(BIN)/python examples/notebooks/execute.py

test: lint  ## lint, types and the tests that run in minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: .venv/.installed  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test-slow: .venv/.installed  ## known learning coefficients of deep linear networks (about 15 minutes)
	$(BIN)/python -m pytest -m slow -s --ignore-glob '*crash*'

test-crashes: .venv/.installed  ## runs killed before every operation on files, power failures, full disks, sequences of all (about an hour)
	$(BIN)/python -m pytest -m slow -s tests/test_crashes.py tests/test_crash_sequences.py tests/test_resume.py

test-oldest:  ## stores and strangers' files with the oldest libraries that are allowed (its own environment; about 8 minutes)
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q -c constraints.txt -e '.[dev]'
	.venv-oldest/bin/pip install -q --no-deps -r oldest.txt
	.venv-oldest/bin/python -m pytest tests/test_strangers.py tests/test_hostile_*.py tests/test_no_side_doors.py tests/test_store.py tests/test_resume.py

planted-bugs: .venv/.installed  ## plant each known bug in a copy and see a test fail (about two hours)
	$(BIN)/python tests/planted_bugs.py

docs:  ## build the site of the docs into site/; broken links and unknown names are errors (its own environment)
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install -q -c constraints.txt $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

wheel:  ## build the wheel, list it, install it alone into an empty environment and try it there (the way to a release)
	test -x .venv-wheel/bin/python || $(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install -q build
	rm -rf dist && .venv-wheel/bin/python -m build --outdir dist
	$(PYTHON) tests/wheel.py dist

figures: .venv/.installed  ## step sizes and peak memory on the demo's last checkpoint (after make demo)
	$(BIN)/python benchmarks/step_size.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/durability.py

truth: .venv/.installed  ## LLCs and error bars with known answers, verdicts, calibration (after make demo; about an hour and a half)
	$(BIN)/python benchmarks/known_llc.py
	$(BIN)/python benchmarks/coverage.py
	$(BIN)/python benchmarks/verdicts.py
	$(BIN)/python benchmarks/false_alarms.py
	$(BIN)/python benchmarks/calibrating.py

.venv-peer/.installed: constraints.txt
	test -x .venv-peer/bin/python || $(PYTHON) -m venv .venv-peer
	.venv-peer/bin/pip install --quiet --constraint constraints.txt devinterp==2.0.1
	touch $@

bench: .venv/.installed .venv-peer/.installed  ## speed against devinterp 2.0.1 and a hand-written loop, and how cost grows (about an hour, idle machine)
	$(BIN)/python benchmarks/speed.py --peer .venv-peer/bin/python
	$(BIN)/python benchmarks/growth.py

clean:  ## remove the environment and the demo's output
	rm -rf .venv .venv-peer .venv-docs .venv-wheel site dist demo_output
