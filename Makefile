PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test long lint types links docs conformance bench board gpu gpu-wheels constraints clean

demo: $(VENV)/.installed  ## the main job: distil the digits teacher to one step, measure it, export it
	$(BIN)/fewstep run digits-dmd2 --resume

test: $(VENV)/.tested  ## the whole suite, and its ten slowest tests
	$(BIN)/pytest -q -n 2 --dist loadscope --durations=10

long: $(VENV)/.tested  ## what is too long for every change: series of kills; run it before an issue is closed
	$(BIN)/pytest -q -n 2 --dist loadscope --durations=10 -m long

lint: $(VENV)/.tested
	$(BIN)/ruff check .

types: $(VENV)/.tested links
	$(BIN)/mypy

docs: $(VENV)/.tested links  ## the site in site/, warnings as errors; `mkdocs serve` shows it while you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

conformance: $(VENV)/.tested  ## full-budget training of every method on the toy
	$(BIN)/python -m fewstep.bench.conformance --out assets/conformance.jsonl

bench: $(VENV)/.tested  ## overhead of trainer and methods: ratios taken in one run
	$(BIN)/python -m fewstep.bench.trainer
	$(BIN)/python -m fewstep.bench.methods --against digits-cd
	$(BIN)/python -m fewstep.bench.readings

board: $(VENV)/.tested  ## rows of the leaderboard, on a machine at rest (else ARGS=--busy): BOARD=digits RECIPES="digits-dmd2 digits-sid"
	$(BIN)/python -m fewstep.bench.board $(BOARD) $(RECIPES) $(ARGS)
	$(BIN)/python -m fewstep.bench.readme

# The environment of this checkout where there is one; otherwise that of the machine, since a new venv would not see a torch
# that lies in a venv itself. Nothing is installed where fewstep is.
GPU_PYTHON = $(or $(wildcard $(BIN)/python),$(PYTHON))
WHEELS ?= wheels

gpu:  ## on a machine with a GPU and torch: at most nine minutes, OUT/gpu.csv and gpu.md; ARGS=--rehearse on a CPU
	$(GPU_PYTHON) -c "import importlib.util as u; raise SystemExit(u.find_spec('fewstep.kernels') is None)" || \
		$(GPU_PYTHON) -m pip install -q --no-index --find-links $(WHEELS) -e . pytest
	$(GPU_PYTHON) -m fewstep.bench.gpu --out $(or $(OUT),gpu) $(ARGS)

gpu-wheels: $(VENV)/.tested  ## all but torch into wheels/, for `make gpu` without network: HAVE="numpy scipy" FOR="--python-version 3.12"
	mkdir -p $(WHEELS)
	$(BIN)/python -m fewstep.bench.versions carried --have $(HAVE) --out $(WHEELS)/packages.txt
	$(BIN)/python -m pip download -q --no-deps --only-binary=:all: $(FOR) -d $(WHEELS) -r $(WHEELS)/packages.txt

constraints: $(VENV)/.tested  ## the versions in this environment as constraints.txt; after a green `make test` alone
	$(BIN)/python -m fewstep.bench.versions tested --out constraints.txt

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.tested: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e ".[test]"
	touch $@ $(VENV)/.installed

# Type checkers do not follow the mapped folders of an editable install; this tree of links shows them the package.
links:
	rm -rf .typing && mkdir -p .typing/fewstep
	for f in fewstep/*; do ln -sf ../../$$f .typing/fewstep/; done
	for d in kernels eval recipes assets; do ln -sfn ../../$$d .typing/fewstep/$$d; done

clean:
	rm -rf $(VENV) .typing build dist *.egg-info
