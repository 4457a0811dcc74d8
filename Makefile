# Every target that needs an environment first makes sure of it: `make demo` and `make test` are all
# that a fresh clone needs.

PYTHON ?= python3
TASK ?= fpn
WHEELHOUSE ?=
TORCH ?=
export WHEELHOUSE TORCH

TASKS := fpn mask_rcnn retinanet
VENV_PYTHON := .venv/bin/python

# Checked while the file is read, so that a typing error does not wait for the installation.
ifneq ($(filter demo,$(MAKECMDGOALS)),)
ifeq ($(filter $(TASK),$(TASKS)),)
$(error TASK=$(TASK) is unknown; choose one of: $(TASKS))
endif
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test fuzz test-oldest lint format clean

help: ## Show this text
	@echo 'Targets:'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo 'Variables:'
	@echo '  PYTHON      interpreter that .venv is made with, 3.10 or later  (make install PYTHON=python3.12)'
	@echo '  TASK        what the demo trains: $(TASKS)  (make demo TASK=mask_rcnn)'
	@echo '  WHEELHOUSE  folder of ready wheels, e.g. of mmcv  (make install WHEELHOUSE=~/wheels)'
	@echo "  TORCH       another torch, with pip's options  (make install TORCH='torch==2.6.0 --index-url URL')"

install: ## Make .venv and install what is missing there
	@$(PYTHON) tools/install.py

demo: install ## Draw a small data set, train on it from nothing, test
	@$(VENV_PYTHON) tools/demo.py $(TASK)

test: install ## Run all tests
	@$(VENV_PYTHON) -m pytest -n 2 --dist loadfile

fuzz: install ## Read more than ten thousand damaged or odd inputs, others every time
	@FUZZ=1 $(VENV_PYTHON) -m pytest -n 2 tests/fuzz

test-oldest: ## Test on the oldest versions that requirements/ allow, in .venv-oldest
	@$(PYTHON) tools/install.py --oldest
	@.venv-oldest/bin/python -m pytest -n 2 --dist loadfile

lint: install ## Check style
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .

format: install ## Mend style where that can be done by itself
	@$(VENV_PYTHON) -m ruff check --fix .
	@$(VENV_PYTHON) -m ruff format .

clean: ## Remove caches and build outputs; .venv, data and work_dirs stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
