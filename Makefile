# make demo | make test | make test-all | make faults | make fuzz | make coverage | make check | make bench: each sets up
# what it needs in .venv, on a machine with Python and git.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One process for each core, with one thread each (tests/conftest.py). Files stay whole: fixtures of a module run once.
PYTEST := $(BIN)/python -m pytest -q --numprocesses auto --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard src/megabatch/*/*/csrc/*.[ch])

.PHONY: demo test test-all faults fuzz coverage check bench docs clean

demo: $(VENV)/.ready
	$(BIN)/megabatch train fashion_mnist_2048 --workers 2

# Without the tests marked slow: minutes on two slow cores.
test: $(VENV)/.ready-dev
	$(PYTEST) -m "not slow"

# Also long examples, fuzzing, sanitizers, compiling for an H200, torchrun and torch.compile.
test-all: $(VENV)/.ready-dev
	$(PYTEST)

# Kills, freezes and stops workers and launchers of the demo's recipe 100 times. FAULTS=10 is shorter.
FAULTS ?= 100
faults: $(VENV)/.ready-dev
	rm -rf benchmarks/out/faults
	$(BIN)/python tests/faults/fault_runs.py --faults $(FAULTS) --output benchmarks/out/faults

# Mutated inputs of every kind, in full numbers; their outcomes are in benchmarks/out/fuzz.jsonl.
fuzz: $(VENV)/.ready-dev
	mkdir -p benchmarks/out
	MEGABATCH_FUZZ_RECORD=benchmarks/out/fuzz.jsonl MEGABATCH_FUZZ_JPEGS=100000 $(BIN)/python -m pytest -q -m slow tests/fuzz \
	    tests/data/jpeg/test_library.py

coverage: $(VENV)/.ready-dev
	$(PYTEST) -m "not slow" --cov --cov-report=term:skip-covered

check: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.ready-dev
	$(BIN)/python benchmarks/optimizer.py --output benchmarks/out
	$(BIN)/python benchmarks/batch_norm.py --output benchmarks/out
	$(BIN)/python benchmarks/step.py --output benchmarks/out
	$(BIN)/megabatch bench allreduce

# mkdocstrings reads the sources without importing them, so the site needs no torch and an environment of its own.
docs: $(VENV)-docs/.ready
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet

$(VENV)-docs/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" \
	    > $(VENV)-docs/requirements.txt
	$(VENV)-docs/bin/python -m pip install --quiet --requirement $(VENV)-docs/requirements.txt
	touch $@

$(VENV)/.ready: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

# timm's LARS is compared with ours; timm comes alone, for it asks for a torchvision that does not load here.
$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps timm==1.0.31
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-docs build site runs benchmarks/out
