# make demo          installs the package, and trains a small model on a CPU
# make test          runs the whole CPU test suite
# make test-oldest   runs it with the oldest versions that pyproject.toml accepts; their PyTorch may be a CUDA build
# make docs-test     builds the documentation in build/site, and runs the code blocks of its pages
# make nightly       runs the tests that take too long for every run, prints the date and the table of uses under each
#                    engine, and writes docs/models.md, the table of model families
# Each command creates its virtual environment. PYTHON=python3.12 selects the interpreter.

PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
TORCH := $(shell sed -n 's/^torch==//p' $(CONSTRAINTS))
READY := $(VENV)/.ready
READY_TO_TEST := $(VENV)/.ready-to-test
# -qq prints only errors: -q would still print notes on the configured package indexes.
PIP := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)
MODEL := models/smollm2-135m-instruct
# All options are given, because accelerate otherwise prints a list of its defaults, and uses one CPU thread.
LAUNCH := $(VENV)/bin/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    --num_cpu_threads_per_process $(shell getconf _NPROCESSORS_ONLN)
# Additional options of the demo: make demo DEMO_OPTIONS="--loss_type simpo"
DEMO_OPTIONS ?=

# The number of test processes, and the order of the tests: make test TEST_OPTIONS="--random-order" WORKERS=1
WORKERS ?= logical --maxprocesses 4
TEST_OPTIONS ?=

.PHONY: demo test test-oldest nightly lint docs docs-test clean
.DELETE_ON_ERROR:

demo: $(READY) $(MODEL)/config.json
	@echo "Training: recipes/dpo_lora.py --config recipes/demo.yaml $(DEMO_OPTIONS)"
	@$(LAUNCH) recipes/dpo_lora.py --config recipes/demo.yaml --overwrite_output_dir true $(DEMO_OPTIONS)

test: $(READY_TO_TEST)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadscope $(TEST_OPTIONS)

test-oldest:
	@$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

nightly: $(READY_TO_TEST)
	@mkdir -p build && rm -f build/habits.md
	@date -u
	@NIGHTLY_TABLE=build/habits.md HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest \
		-m 'nightly or in_table' $(TEST_OPTIONS); result=$$?; cat build/habits.md; exit $$result
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.scoring.families --write docs/models.md

lint: $(READY_TO_TEST)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

# Generates the pages of losses, papers, settings and TRL, the loss atlas, and the file of each loss in recipes/configs.
docs: $(READY_TO_TEST)
	@$(VENV)/bin/python -m hf_prefopt.reporting.loss_page > docs/losses.md
	@$(VENV)/bin/python -m hf_prefopt.reporting.papers_page > docs/papers.md
	@$(VENV)/bin/python -c 'from hf_prefopt import config, config_docs; \
		print(config_docs.settings_page(config.PreferenceConfig), end="")' > docs/settings.md
	@$(VENV)/bin/python -m hf_prefopt.trl.page > docs/from_trl.md
	@$(VENV)/bin/python -m hf_prefopt.reporting.loss_atlas > docs/images/loss_atlas.svg
	@$(VENV)/bin/python recipes/configs/write.py

# Builds the site in build/site, and runs every Python block of its pages.
docs-test: $(READY_TO_TEST)
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs --quiet build --strict
	@HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest tests/docs

clean:
	rm -rf $(VENV) .venv-oldest models runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(MODEL)/config.json: | $(READY)
	@$(VENV)/bin/python recipes/get_smollm2.py --to $(MODEL)

# The stamp file is written last, so an interrupted installation continues with the next make.
$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "hf_prefopt needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Setting up $(VENV): $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch ..."
	@# PyTorch is installed first, with its exact version: a dependency of another package may install a large CUDA build.
	@$(PIP) torch==$(TORCH)
	@echo "Installing hf_prefopt and its dependencies ..."
	@$(PIP) -e '.[demo]'
	@touch $@

$(READY_TO_TEST): $(READY)
	@echo "Installing the dependencies of the tests ..."
	@# DeepSpeed is built against the installed torch (--no-build-isolation), so its build dependencies come first.
	@$(PIP) setuptools packaging ninja numpy
	@DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	@$(PIP) -e '.[dev]'
	@touch $@
