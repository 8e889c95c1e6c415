# The commands a newcomer, a developer and CI run; each sets up what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help demo test test-all check format docs bench bench-score clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt -e .
	@touch $(STAMP)

demo: $(STAMP)  ## train HAF, BT and DPO on a made-up preference world and compare them
	$(BIN)/hafrm demo

test: $(STAMP)  ## every test that needs no network, no GPU and little time
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(STAMP)  ## the slow proofs too, and those for a GPU, if need be on the CPU
	HAFRM_CUDA_TESTS_ON=$${HAFRM_CUDA_TESTS_ON:-any} $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(STAMP)  ## formatting, lint and strict types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## put the code in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)  ## build the site into site/; a broken link is an error
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(STAMP)  ## time a training step against TRL (installs TRL)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt trl
	$(BIN)/python benchmarks/train_step.py --data $(DATA) --tokenizer $(TOKENIZER) $(OPTIONS)

bench-score: $(STAMP)  ## time scoring against plain transformers
	$(BIN)/python benchmarks/score.py --data $(DATA) --tokenizer $(TOKENIZER)

clean:  ## remove the environment and what runs wrote
	rm -rf $(VENV) runs demo-run site .pytest_cache .mypy_cache .ruff_cache
