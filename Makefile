# Every target that needs the environment makes it first: a fresh clone needs `make demo` or `make test` alone.
# Once .venv is made, its Python serves where the system's python3 is too old.
PYTHON ?= $(shell .venv/bin/python -c '' 2>/dev/null && echo .venv/bin/python || echo python3)
TASK ?= fpn
export WHEELHOUSE TORCH

RUN := .venv/bin/python

ifneq ($(filter demo,$(MAKECMDGOALS)),)
ifeq ($(filter $(TASK),fpn mask_rcnn retinanet search),)
$(error TASK=$(TASK) is unknown; choose one of: fpn, mask_rcnn, retinanet, search)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-gpu fuzz test-oldest lint format clean

help: ## Show this text
	@echo 'Targets:'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'Variables:'
	@echo '  PYTHON       what .venv is made with, 3.10 or later     (make install PYTHON=python3.12)'
	@echo '  TASK         of the demo: fpn, mask_rcnn, retinanet, search   (make demo TASK=mask_rcnn)'
	@echo '  WHEELHOUSE   folder of ready wheels, of mmcv say        (make install WHEELHOUSE=~/wheels)'
	@echo "  TORCH        another torch, with pip's options          (make install TORCH='torch==2.13.0 --index-url URL')"

install: ## Make .venv and install what is missing there
	@$(PYTHON) tools/install.py

demo: install ## Draw a small dataset, train on it from scratch, test, predict
	@$(RUN) tools/demo.py $(TASK)

test: install ## Run the tests
	@$(RUN) -m pytest -n 2 --dist loadfile

test-slow: install ## Run the long tests that `make test` leaves out
	@$(RUN) -m pytest -n 2 --dist loadfile -m slow

test-gpu: install ## Run the tests that need a GPU
	@$(RUN) -m pytest tests/gpu

fuzz: install ## Read more than ten thousand corrupt or odd inputs, others every time
	@FUZZ=1 $(RUN) -m pytest -n 2 tests/fuzz

test-oldest: ## Test on the oldest versions that requirements/ allow, in .venv-oldest
	@$(PYTHON) tools/install.py --oldest
	@.venv-oldest/bin/python -m pytest -n 2 --dist loadfile

lint: install ## Check style
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

format: install ## Fix style
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

clean: ## Remove caches and build outputs; .venv, data, work_dirs and built wheels stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	@find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
