# Two commands for a fresh machine: `make bench` and `make test`.
# Both need only git, make, and a Python of at least 3.10 with venv.

PYTHON ?= python3
VENV ?= .venv
BENCH ?= # more options, e.g. make bench BENCH="--seeds 0 1 2"
SUITE ?= run all --quick --jobs 2
TEST ?= # more options, e.g. make test TEST="-m slow"
DIST ?= dist
SITE ?= site

.DEFAULT_GOAL := help
.PHONY: help bench suite test coverage lint docs package clean

help: ## Show the commands
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/'

bench: $(VENV)/.installed-bench ## Learn ten permuted-MNIST tasks with five methods
	@$(VENV)/bin/python -m benchmarks.permuted_mnist $(BENCH)

suite: $(VENV)/.installed-bench ## Run the benchmark suite, by default a small version of everything
	@$(VENV)/bin/python -m benchmarks $(SUITE)

# A file is one process's: what its tests share is made once.
test: $(VENV)/.installed-test ## Run the test suite
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile $(TEST)

coverage: $(VENV)/.installed-test ## Measure which branches of the package the tests reach (an hour or so)
	$(VENV)/bin/python -m coverage run -m pytest --ignore=tests/benchmarks
	$(VENV)/bin/python -m coverage report

lint: $(VENV)/.installed-test ## Check style and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

docs: $(VENV)/.installed-docs ## Build the documentation into site/, and check its links
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --site-dir $(SITE)

package: $(VENV)/.installed-package ## Build wheel and source distribution, and check them
	rm -rf rotate_ewc.egg-info # its list of files, which setuptools would take again, may be old
	rm -f $(DIST)/*.whl $(DIST)/*.tar.gz
	$(VENV)/bin/uv build --quiet --python $(VENV)/bin/python --out-dir $(DIST)
	$(VENV)/bin/twine check --strict $(DIST)/*.whl $(DIST)/*.tar.gz
	$(VENV)/bin/python .ci/distributions.py $(DIST)

clean: ## Remove the virtual environment
	rm -rf $(VENV)

# A stamp for each extra, so that an install happens once and again only when the metadata change.
$(VENV)/.installed-%: pyproject.toml
	@echo "Installing into $(VENV): this takes a few minutes the first time."
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --editable '.[$*]'
	@touch $@
