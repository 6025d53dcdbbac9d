# Each target makes .venv first if it is missing. PYTHON chooses the interpreter that .venv is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test test-all test-rest campaign lint bench study clean
.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(STAMP)  ## Run the main job on the small world; writes runs/demo/report.html
	$(BIN)/lavender demo --out runs/demo

test: $(STAMP)  ## Test what must hold for a change, on two cores (under 10 minutes)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope -m "not full"

test-all: test test-rest  ## Run every test, on two cores (under 25 minutes), and note that they passed
	$(BIN)/python -m tests.content --record

test-rest: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope -m full

campaign: $(STAMP)  ## Kill a training at every step of its writing, and at 50 random moments (about five minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.training.campaign

lint: $(STAMP)  ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## Time attention capture against its alternatives
	$(BIN)/python bench/attn_fusion.py

study: $(STAMP)  ## Run the alignment study again (about three hours on two cores)
	$(BIN)/python bench/alignment_study.py --out runs/alignment

clean:  ## Remove .venv and runs
	rm -rf $(VENV) runs

$(STAMP): pyproject.toml constraints.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and alone, so that no other package chooses its build.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
