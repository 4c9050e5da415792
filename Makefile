# One command each; CI calls the same. Setting up builds .venv by itself, once.
PYTHON ?= python3
WORLD_SIZE ?= 8
PROFILE ?= standard
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup suites test lint types format bench counters faults check clean help

help:
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

setup: $(READY) ## build .venv with everything that is needed

# torch first and alone: resolved together with the others, a looser requirement would pull gigabytes of CUDA packages
$(READY): pyproject.toml constraints.txt
	@echo "Setting up .venv (once, about two minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Expected Python 3.11 or newer but got %d.%d. Give one: make PYTHON=python3.11" % sys.version_info[:2])'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

suites: $(READY) ## run the suites on the built-in backends
	$(BIN)/pytest suites --world-size=$(WORLD_SIZE) --profile=$(PROFILE)

test: $(READY) ## run the project's own tests
	$(BIN)/pytest tests -n 2 --dist loadfile

lint: $(READY) ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## mypy, strict
	$(BIN)/mypy

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## measure torch, the reference and torch.save on rank 0, and write a report
	$(BIN)/dcpbench bench run

counters: $(READY) ## pin what small saves do, after a change that is meant
	$(BIN)/dcpbench bench counters --write tests/expected_counters.json

faults: $(READY) ## what faults do to the built-in backends, as the page docs/faults.md
	$(BIN)/dcpbench faults table > docs/faults.tmp
	mv docs/faults.tmp docs/faults.md

check: lint types test ## what a change must pass
	$(MAKE) suites PROFILE=quick

clean: ## remove what was built
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
