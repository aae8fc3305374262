# make demo | make test | make setup | make lint | make docs | make package | make bench
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint docs package bench

setup: $(STAMP)

# torch goes first and alone: pinned, so that pip does not pick a build with gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt waveletgpt/ops/kernels.cpp waveletgpt/ops/kernels.h
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("waveletgpt needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -e ".[dev]" -c constraints.txt
	touch $@

# Two arms on the Python standard library's own sources: under 10 minutes on 2 cores.
demo: setup
	$(BIN)/waveletgpt compare --recipe recipes/demo.yaml --out runs/demo --resume

test: setup
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, into site/; without network, and with every warning an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

# The source archive and a wheel, into dist/.
package: setup
	$(BIN)/python -m build --outdir dist

# Speed on a CPU, about 10 minutes; on a GPU: benchmarks/gpu.sh FOLDER.
bench: setup
	$(BIN)/python benchmarks/operator_cpu.py --out runs/bench
	$(BIN)/python benchmarks/training.py --out runs/bench
	$(BIN)/python benchmarks/decoding.py --out runs/bench
	$(BIN)/python benchmarks/scaling.py --out runs/bench
	$(BIN)/python benchmarks/measuring.py runs/bench
