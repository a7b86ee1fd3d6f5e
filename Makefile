# `make demo` shows the main job, `make test` proves it, `make check` reads it. Each sets up what it needs.

PYTHON ?= python3.11
VENV   := .venv
STAMP  := $(VENV)/.installed

.PHONY: demo test check bench clean

demo: $(STAMP)
	@tests/demo/demo.sh "$(VENV)/bin"

test: $(STAMP)
	$(VENV)/bin/pytest -n 3 --dist loadfile

check: $(STAMP)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

bench: $(STAMP)
	@for bench in tests/bench/bench_*.py; do echo "== $$bench"; $(VENV)/bin/python $$bench || exit 1; done

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
