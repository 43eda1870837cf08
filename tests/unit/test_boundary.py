"""An error of ours never reaches the engine, and is said once."""

import pytest

from disagg_plugin.boundary import boundary


class Part:
    """Something with one call that may fail."""

    def __init__(self) -> None:
        self.broken = False
        self.gave_up = 0

    def give_up(self) -> None:
        self.broken = True
        self.gave_up += 1

    @boundary
    def divide(self, by: int) -> float:
        return 1 / by


def test_a_call_that_works_answers() -> None:
    assert Part().divide(2) == 0.5


def test_the_first_error_is_logged_and_ends_the_part(caplog: pytest.LogCaptureFixture) -> None:
    part = Part()
    assert part.divide(0) is None
    assert part.divide(0) is None
    assert part.divide(2) is None, "broken for good"
    assert part.gave_up == 1
    assert [record.message for record in caplog.records] == [
        "disagg: Part.divide failed; no KV is exchanged until a restart"
    ]
