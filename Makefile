# make demo       set up, fine-tune on real handwritten digits, load the result back, show what it predicts
# make test       set up, lint, type-check, run the tests (what CI runs)
# make test-all   the slow tests too
# make test-floor the tests on the lowest versions that pyproject.toml allows

PYTHON ?= python3
VENV   ?= .venv
WORKERS ?= 2
RUN    := $(VENV)/bin/python

export TOKENIZERS_PARALLELISM := false
# One thread per test process: with as many processes as cores, more threads only wait for each other.
test test-all test-floor: export OMP_NUM_THREADS := 1

.PHONY: demo test test-all test-floor check setup clean

demo: setup
	$(RUN) scripts/demo.py

test: check
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

test-all: check
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile

check: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, and $(PYTHON) is " + sys.version.split()[0] + ": run make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet uv
	$(VENV)/bin/uv pip install --quiet --python $(RUN) --editable ".[test]"
	@touch $@

test-floor: .venv-floor/installed
	.venv-floor/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

.venv-floor/installed: pyproject.toml
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet uv
	.venv-floor/bin/uv pip install --quiet --resolution lowest-direct --python .venv-floor/bin/python --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-floor runs build *.egg-info
