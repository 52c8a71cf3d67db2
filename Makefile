PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*)

.PHONY: env sample test lint clean

env: .venv/ready

# The package is installed in place; only the compiled extension and the dependencies need another installation.
.venv/ready: pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,lint]'
	touch $@

sample: env
	$(BIN)/unmask sample

test: env
	$(BIN)/python -m pytest -q

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build *.egg-info kernels/*.so
