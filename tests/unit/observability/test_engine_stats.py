"""When the scheduler process sends figures: at rest for the last time, and never at the engine's expense."""

from typing import Any

import pytest

from disagg_plugin.config import DisaggSettings
from disagg_plugin.observability import engine_stats
from disagg_plugin.observability.engine_stats import EngineStats
from disagg_plugin.observability.journal import Journal

SETTINGS = DisaggSettings.model_validate({"observability": {"stats_interval_s": 60}})  # only rest is due in a test


class Bench:
    def __init__(self) -> None:
        self.view: dict[str, Any] = {"inactive_reason": ""}
        self.asked = 0
        self.journal = Journal()
        self.stats = EngineStats(SETTINGS, self.journal, self.figures, ring_slots=lambda: 16, ranks=lambda: 2)

    def figures(self) -> dict[str, Any]:
        self.asked += 1
        if isinstance(error := self.view.get("raise"), Exception):
            raise error
        return self.view

    def step(self, *, needs_steps: bool = False) -> Any:
        return self.stats.take(needs_steps=needs_steps)


def test_the_last_figures_leave_with_the_step_that_ends_the_last_request_and_only_then():
    bench = Bench()
    bench.stats.request_came()
    assert bench.step() is not None  # the first ones
    assert bench.step() is None
    bench.stats.request_ended()
    assert bench.step() is not None
    assert bench.step() is None
    assert bench.asked == 2


def test_an_engine_that_still_sends_for_others_is_not_at_rest():
    bench = Bench()
    bench.stats.request_came()
    bench.step()
    bench.stats.request_ended()
    assert bench.step(needs_steps=True) is None
    assert bench.step() is not None


def test_capacity_is_that_of_all_ranks():
    bench = Bench()
    bench.view["decode"] = {"ranks": {"0": {"slots_in_use": 1}, "1": {"slots_in_use": 2}}}
    gauges = bench.step().gauges
    assert gauges["disagg_ring_slots\x1fin_use"] == 3
    assert gauges["disagg_ring_slots\x1fcapacity"] == 16
    assert gauges["disagg_private_buffers\x1fcapacity"] == 2 * SETTINGS.transfer.region_slots


def test_the_state_for_admission_may_be_named_at_any_time():
    bench = Bench()
    bench.stats.request_came()
    assert bench.step().engine_state is None
    bench.stats.engine_state = lambda: {"queued": 1}
    bench.stats.request_ended()
    assert bench.step().engine_state == {"queued": 1}


def test_an_error_in_the_figures_ends_no_step_and_is_said_once(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(engine_stats.logger, "exception", said.append)
    bench = Bench()
    bench.view["raise"] = ValueError("mine")
    for _ in range(3):
        bench.stats.request_came()
        assert bench.step() is None
        bench.stats.request_ended()
        assert bench.step() is None
    assert len(said) == 1
