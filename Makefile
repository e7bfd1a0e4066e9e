PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

CONSUMERS = $(patsubst tests/interop/environments/%.txt,.consumers/%/.installed,$(wildcard tests/interop/environments/*.txt))

.PHONY: help install demo docs test test-slow test-consumers lint clean

help:
	@echo "make demo       run the main job on the packaged model (sets itself up)"
	@echo "make test       run the tests (sets itself up)"
	@echo "make test-slow  run the tests that take longer"
	@echo "make test-consumers  hand plans to the other tools, each in an environment of its own"
	@echo "make docs       write docs/configuration.md from the settings"
	@echo "make lint       check style, types and imports"

install: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing allocator and what it needs into $(VENV) (a few minutes the first time) ..."
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable ".[test]"
	@touch $@

demo: $(VENV)/.installed
	@rm -rf runs/demo
	$(BIN)/allocator search search_spaces/runs/structured.yaml --name demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow --numprocesses 3 --dist loadfile --no-loadscope-reorder

.consumers/%/.installed: tests/interop/environments/%.txt
	$(PYTHON) -m venv .consumers/$*
	@echo "installing what $< names into .consumers/$* ..."
	.consumers/$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

test-consumers: $(VENV)/.installed-test $(CONSUMERS)
	$(BIN)/python -m pytest -m consumers

docs: $(VENV)/.installed
	$(BIN)/python -m allocator.run.config.reference

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .consumers
