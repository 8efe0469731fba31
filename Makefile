# The README's two commands. Both work on a fresh machine with Python 3.11 or newer: they make .venv and install into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# For recipes that change their folder.
BIN_FROM_ANYWHERE = "$(abspath $(BIN))"
# Threads that wait by spinning take the cores from everything else; see docs/decisions.md.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-full lint pytest faults load release-check docs tutorials clean

demo: $(VENV)/installed
	$(BIN)/upcycle3d demo --out demo

# One test process per core, each with one thread: the networks of the tests are too small to gain from a second one.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile
test: $(VENV)/installed-dev
	$(MAKE) -j2 lint pytest

pytest: $(VENV)/installed-dev
	$(PYTEST) -m "not slow"

test-full: lint
	$(PYTEST)

# Damaged inputs and kills, for MINUTES per seed; docs/reliability.md explains the table.
MINUTES ?= 20
SEEDS ?= 0
faults: $(VENV)/installed-dev
	cd tests && OMP_NUM_THREADS=1 $(BIN_FROM_ANYWHERE)/python -m faults --minutes $(MINUTES) --seeds $(SEEDS) --json ../faults.json

# Both endpoints of `moe serve` under more requests than they take, each for LOAD_MINUTES; docs/reliability.md explains what counts as a fault.
LOAD_MINUTES ?= 5
load: $(VENV)/installed-dev
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[serve]'
	cd tests && OMP_NUM_THREADS=1 $(BIN_FROM_ANYWHERE)/python -m faults.overload --minutes $(LOAD_MINUTES) --endpoint completions
	cd tests && OMP_NUM_THREADS=1 $(BIN_FROM_ANYWHERE)/python -m faults.overload --minutes $(LOAD_MINUTES) --endpoint detections

# What a user gets: both archives and their metadata, the Dockerfile, and tests that run on the installed wheel, from the unpacked source archive
# in a folder of their own. The tests of documents, layers and the repository itself stay with `make test`.
PYTHON_OF_WHEEL ?= $(PYTHON)
WHEEL_TESTS ?= core ops wire vehicle conformance datasets evaluation test_public_api.py test_old_files.py
release-check: $(VENV)/installed-dev
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[release]'
	$(BIN)/hadolint Dockerfile
	rm -rf dist && $(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	set -e; clean=$$(mktemp -d); trap 'rm -rf "$$clean"' EXIT; wheel=$$(ls $(CURDIR)/dist/*.whl); \
	$(PYTHON_OF_WHEEL) -m venv $$clean/venv; \
	$$clean/venv/bin/pip install -q -c constraints.txt "upcycle3d[dev] @ file://$$wheel"; \
	tar -xzf dist/*.tar.gz -C $$clean; cd $$clean/upcycle3d-*/tests; \
	$$clean/venv/bin/python -c "import upcycle3d; assert upcycle3d.__file__.startswith('$$clean/venv/'), upcycle3d.__file__"; \
	$$clean/venv/bin/upcycle3d doctor --repeats 0; \
	OMP_NUM_THREADS=1 $$clean/venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m "not slow" $(WHEEL_TESTS)

# The site of docs/, in build/site: every link is checked, and the API pages are made from docstrings through the link that mypy uses too.
docs: $(VENV)/installed-dev
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	mkdir -p .typecheck && ln -sfn .. .typecheck/upcycle3d
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Run the notebooks again and keep their outputs. Several minutes.
tutorials: $(VENV)/installed-dev
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[tutorials]'
	cd docs/tutorials && $(BIN_FROM_ANYWHERE)/jupyter execute --inplace --timeout=1800 *.ipynb

# ruff, and mypy through a folder that holds a link named like the package to the root.
lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .typecheck && ln -sfn .. .typecheck/upcycle3d
	cd .typecheck && $(BIN_FROM_ANYWHERE)/mypy --config-file ../pyproject.toml -m upcycle3d -p upcycle3d.core -p upcycle3d.ops -p upcycle3d.datasets -p upcycle3d.perception -p upcycle3d.tools

# constraints.txt pins torch 2.13.0. For another build (CUDA) make the environment yourself, without the constraints: see README.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "upcycle3d needs Python 3.11 or newer, found %d.%d; run make PYTHON=python3.11" % sys.version_info[:2])'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build dist *.egg-info .typecheck
