# make demo    distil the bundled teacher, evaluate the student, write the report
# make test    the whole test suite
# make lint    ruff and mypy
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check -c constraints.txt
# Two processes of many threads on few cores slow each other down badly; tests use small tensors anyway.
TEST_ENV := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help demo test lint

help:  ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 14

demo: $(VENV)/.installed  ## distil the bundled teacher and show the result; options: make demo ARGS="--trainer.max_steps=20"
	$(RUN) cli.py fit --config configs/quickstart.yaml $(ARGS)

test: $(VENV)/.installed-test  ## the whole test suite; options: make test ARGS="-k prompts"
	$(TEST_ENV) $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.installed-test  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# Stamp files: nothing happens, and no network is needed, until the requirements change.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; give another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/.installed
	$(PIP) -e ".[test]"
	@touch $@ $(VENV)/.installed
