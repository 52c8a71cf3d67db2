PYTHON ?= python3
BIN := .venv/bin
comma := ,
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)

.PHONY: env sample test bench tables gpu-check lint clean

env: .venv/ready

# The page of `unmask report` is tested in Chromium where there is one.
EXTRAS := test,lint$(if $(shell command -v chromium chromium-browser google-chrome),$(comma)browser)

# The package is installed in place; only the compiled extension and the dependencies need another installation.
.venv/ready: pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	touch $@

sample: env
	$(BIN)/unmask sample

# Files of tests side by side, each on one thread.
test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

# Times every operator beside its peers, and a denoising step, on two cores; let nothing else run meanwhile.
# make bench MDLM=path/to/checkout puts the published sampler, github.com/kuleshov-group/mdlm, beside the step.
bench: env
	$(BIN)/python -m benchmarks run --device cpu --threads 2 --out runs/bench
	$(if $(MDLM),$(BIN)/pip install --quiet --disable-pip-version-check einops)
	$(BIN)/python -m benchmarks.step --device cpu --threads 2 $(if $(MDLM),--mdlm $(MDLM)) --out runs/bench/step-cpu.json

# Writes the tables of README.md and of the scheduling page from benchmarks/results/.
tables: env
	$(BIN)/python -m benchmarks.tables

# For a machine with an NVIDIA GPU, with the packages that its Python has: build, tests, benchmarks, in under nine minutes.
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu_check

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build *.egg-info kernels/*.so
