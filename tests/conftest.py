"""What every test shares: the models, and a table of the slowest fixtures and engine starts at the end."""

import os
import time
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import models
import pytest
from engines import TIMINGS, Timing

SHOWN_S = 1.0

pytest_plugins = ["second_try"]

# each engine family has its own environment (see the Makefile); cross_engine needs both, and is told where the other is
_NEEDS = {
    "e2e": find_spec("vllm"),
    "unit/vllm": find_spec("vllm"),
    "contract/test_sglang_fill.py": find_spec("sglang"),
    "contract/test_sglang_surface.py": find_spec("sglang"),
    "sglang_e2e": find_spec("sglang"),
    "main_paths": find_spec("vllm") or find_spec("sglang"),
    "cross_engine": find_spec("vllm") and os.environ.get("DISAGG_SGLANG_PYTHON"),
}
collect_ignore = [folder for folder, there in _NEEDS.items() if not there]

# two noisy cores, perhaps with engines on them: how long an example takes says nothing about the code
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A random Llama of 4 layers."""
    return models.tiny()


@pytest.fixture(scope="session")
def smollm2_model() -> Path:
    """A small model that writes real text."""
    return models.smollm2()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
    started = time.monotonic()
    try:
        return (yield)
    finally:
        TIMINGS.append(Timing(f"fixture {fixturedef.argname} ({fixturedef.scope})", time.monotonic() - started))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    slow = [timing for timing in TIMINGS if timing.seconds >= SHOWN_S]
    if slow:
        terminalreporter.section("seconds per fixture and engine start")
        for what, seconds in sorted(slow, key=lambda timing: -timing.seconds):
            terminalreporter.write_line(f"{seconds:8.1f}  {what}")
