"""A fixed corpus of what anybody can send us, the same in every run; ``benchmarks/fuzzing.py`` looks for new values."""

import logging

import pytest
from fuzz.targets import CORPUS, TARGETS
from hypothesis import HealthCheck, given, settings

EXAMPLES = {"decode_role": 250, "prefill_role": 300, "notifications": 60, "chunk_sealed": 60}


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "disagg_plugin")


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_that_is_sent_to_us_does_harm(name: str) -> None:
    strategy, check = TARGETS[name]

    @settings(
        max_examples=EXAMPLES.get(name, 400),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def fuzzed(value: object) -> None:
        check(value)

    fuzzed()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in CORPUS.items() for value in values])
def test_what_did_harm_once_does_none_now(name: str, value: object) -> None:
    _, check = TARGETS[name]
    check(value)
