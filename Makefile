# make demo       set up, fine-tune on real handwritten digits, load the result back, show what it predicts
# make cards      make the models of scripts/recipes/ anew, and their cards in model_cards/
# make test-quick tests that start no processes and no browser, in under 90 s on two cores
# make test       set up, lint, type-check, run the tests (with `make browser`: what CI runs)
# make test-all   the slow tests too
# make test-floor the tests on the lowest versions that pyproject.toml allows
# make browser    install a Chromium for the tests of pages, which are skipped without one
# make docs       test the documentation: links, flags and code blocks
# make gpu        on a machine with a CUDA device: tests and benchmarks, written to docs/speed-gpu.md

PYTHON ?= python3
VENV   ?= .venv
# Test processes, for two cores: tests also wait for servers, browsers and the processes that they start.
WORKERS ?= 3
RUN    := $(VENV)/bin/python

export TOKENIZERS_PARALLELISM := false
# One thread per test process: more threads would only wait for each other.
test-quick test test-all test-floor: export OMP_NUM_THREADS := 1

# Libraries are compiled once: tests start processes by the dozen, and each would spend seconds on it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo cards test-quick test test-all test-floor check lint browser docs gpu setup clean

demo: setup
	$(RUN) scripts/demo.py

# The runs that model_cards/ describes. Another one alone: make cards RECIPES=digits
RECIPES ?= digits fashion-mnist

cards: setup
	set -e; for name in $(RECIPES); do \
		OMP_NUM_THREADS=1 $(RUN) scripts/finetune.py --config scripts/recipes/$$name.yaml --output-dir runs/$$name --overwrite; \
		mkdir -p model_cards/$$name/pictures; \
		cp runs/$$name/README.md runs/$$name/results.json model_cards/$$name/; \
		cp runs/$$name/pictures/*.png model_cards/$$name/pictures/; \
	done

test-quick: setup
	$(RUN) -m pytest -n 2 --dist loadfile --quick

# Types are checked while the tests run, which leave a core idle now and then; errors of mypy come last.
test: TESTS := -m "not slow"
test test-all: lint
	@$(RUN) -m mypy >$(VENV)/types.txt 2>&1 & types=$$!; \
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile --durations 20 $(TESTS); tested=$$?; \
	wait $$types; typed=$$?; [ $$typed = 0 ] || cat $(VENV)/types.txt; \
	[ $$tested = 0 ] && [ $$typed = 0 ]

check: lint
	$(RUN) -m mypy

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Pages are tested in a real Chromium. It is installed by the system's package manager or by playwright.
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable

browser: setup
	@[ -n "$$(which $(BROWSERS) 2>/dev/null)" ] || ls -d $(HOME)/.cache/ms-playwright/chromium* >/dev/null 2>&1 \
		|| { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1 \
		|| $(RUN) -m playwright install chromium >/dev/null 2>&1 \
		|| echo "No Chromium was found, and none could be installed: the tests of pages will be skipped"

docs: setup
	$(RUN) -m pytest tests/integration/test_docs.py

gpu: setup
	$(RUN) scripts/gpu.py

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
