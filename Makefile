# make demo       set up, fine-tune a ViT on handwritten digits, evaluate the saved model
# make cards      train the models of scripts/recipes/ again, and update their cards in model_cards/
# make pictures   draw docs/images/ again, from runs/digits
# make site       build the documentation's site in site/, and fail if a link or an object is missing
# make test-quick run the fastest test files of each folder, in under 60 s on two cores
# make check      lint, check types and the size of the code
# make test       set up, lint, run all tests except the slow ones (CI runs `make browser check test`)
# make test-all   like `make test`, including the slow tests
# make coverage   like `make test`, and report how many lines of each file run
# make test-floor run the tests with the lowest package versions that pyproject.toml allows
# make browser    install Chromium for the tests of HTML pages, which are skipped without Chromium
# make docs       test the documentation: links, flags and code blocks
# make dist      build the wheel and the source distribution, and check them
# make -k gpu     measure the speed on a CUDA device, train with sharded weights, and test the models

PYTHON ?= python3
VENV   ?= .venv
# Number of test processes for two cores. Each one imports the libraries, which takes 16 s of CPU time.
WORKERS ?= 2
RUN    := $(VENV)/bin/python

export TOKENIZERS_PARALLELISM := false
# One thread per test process, because more threads than cores make the tests slower
test-quick test test-all coverage test-floor: export OMP_NUM_THREADS := 1

# Let Python cache bytecode. Otherwise, each subprocess of a test compiles libraries again, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: dist demo cards pictures site test-quick test test-all coverage test-floor check lint browser docs gpu gpu-speed \
	gpu-sharded gpu-tests setup clean

demo: setup
	$(RUN) scripts/demo.py

# The wheel and the source distribution, as .github/workflows/release.yml publishes them. Requires uv and twine.
DIST ?= dist

dist:
	$(PYTHON) -m uv build --out-dir $(DIST)
	$(PYTHON) -m twine check --strict $(DIST)/*.whl $(DIST)/*.tar.gz

# Recipes of the cards in model_cards/, whose reports are not committed. To run only one recipe: make cards RECIPES=digits
RECIPES ?= digits fashion-mnist

cards: setup
	set -e; for name in $(RECIPES); do \
		OMP_NUM_THREADS=1 $(RUN) scripts/finetune.py --config scripts/recipes/$$name.yaml --output-dir runs/$$name --overwrite; \
		mkdir -p model_cards/$$name/images; \
		cp runs/$$name/results.json model_cards/$$name/; \
		$(RUN) -c "from pathlib import Path; from modeling_vitcls.hub.model_folder import ModelFolder; \
			from modeling_vitcls.publishing.card import render_card; \
			print(render_card(ModelFolder(Path('runs/$$name')), license_id='apache-2.0'), end='')" \
			> model_cards/$$name/README.md; \
		$(RUN) -c "import yaml; from pathlib import Path; from modeling_vitcls.hub.model_folder import ModelFolder; \
			print(yaml.safe_dump(ModelFolder(Path('runs/$$name')).shareable_flags, sort_keys=False), end='')" \
			> model_cards/$$name/config.resolved.yaml; \
		cp runs/$$name/images/*.png model_cards/$$name/images/; \
		sed -i.bak '/^\[report.html\]/,+1d' model_cards/$$name/README.md && rm model_cards/$$name/README.md.bak; \
	done

# The report image is a screenshot of runs/digits/report.html, which `make cards RECIPES=digits` writes.
pictures: setup
	$(RUN) -m playwright install chromium
	$(RUN) -m playwright screenshot --viewport-size "1280, 1060" --color-scheme light --timeout 300000 \
		file://$(CURDIR)/runs/digits/report.html docs/images/report.png

site: setup
	$(VENV)/bin/uv pip install --quiet --python $(RUN) --editable ".[docs]"
	$(RUN) -m mkdocs build --strict

# Files that take at most 8 s of CPU time each
QUICK := \
	test_import_order test_options \
	$(addprefix analysis/test_,maps) \
	$(addprefix cli/test_,parsing) \
	$(addprefix conversion/test_,processors) \
	$(addprefix data/test_,batches labels sampling sources splits) \
	$(addprefix hub/test_,provenance) \
	$(addprefix inference/test_,inputs metrics prediction_rows) \
	$(addprefix model/test_,adaptation configuration outputs positions released_checkpoints structure tokens) \
	$(addprefix runtime/test_,errors files) \
	$(addprefix training/test_,defaults model optimizer)

test-quick: setup
	$(RUN) -m pytest -n 2 --dist loadfile -m "not slow" $(QUICK:%=tests/%.py)

test coverage: TESTS := -m "not slow"
# in the order of the folders: xdist would start long files with few tests last
test-all: TESTS := --no-loadscope-reorder
coverage: TESTS += --cov --cov-report term
test test-all coverage: lint
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile --durations 20 $(TESTS)

check: lint
	$(RUN) -m mypy
	$(RUN) -m pytest -q tests/test_size.py tests/test_figures.py

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# HTML pages are tested in Chromium, which is installed with the system's package manager or with playwright.
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable

browser: setup
	@[ -n "$$(which $(BROWSERS) 2>/dev/null)" ] || ls -d $(HOME)/.cache/ms-playwright/chromium* >/dev/null 2>&1 \
		|| { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1 \
		|| $(RUN) -m playwright install chromium >/dev/null 2>&1 \
		|| echo "Chromium was not found and could not be installed: the tests of HTML pages will be skipped"

docs: setup
	$(RUN) -m pytest tests/integration/test_docs.py

gpu: gpu-speed gpu-sharded gpu-tests

# Written to docs/speed-gpu.md
gpu-speed: setup
	$(RUN) scripts/benchmark.py --work inference step --device cuda --backends torch compiled --batch-sizes 1 64 \
		--markdown docs/speed-gpu.md

gpu-sharded: setup
	$(RUN) -m accelerate.commands.launch --config_file scripts/accelerate/fsdp2.yaml \
		--num_processes $$($(RUN) -c "import torch; print(torch.cuda.device_count())") \
		-m modeling_vitcls.cli finetune --config digits --max-steps 10 --no-report --overwrite --output-dir runs/fsdp2

gpu-tests: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests/model -n 4 --dist loadfile -m "not slow"

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "modeling_vitcls requires Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + ". Run make PYTHON=python3.11 ...")'
	@echo "Installing into $(VENV): 6.3 GB of downloads on Linux, because PyPI's torch contains CUDA. Without a GPU, UV_TORCH_BACKEND=cpu downloads far less"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet uv
	$(VENV)/bin/uv pip install --python $(RUN) --editable ".[test]"
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
