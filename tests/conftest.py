"""What every test shares: the models, and a table of the slowest fixtures and engine starts at the end."""

import time
from collections.abc import Generator
from pathlib import Path

import hypothesis
import models
import pytest
from engines import TIMINGS, Timing

SHOWN_S = 1.0

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
