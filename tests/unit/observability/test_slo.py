"""SLO tracking in virtual time, against plain lists of what happened."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.observability.slo import (
    WINDOWS_S,
    Path,
    Served,
    SlidingCounts,
    SlidingQuantiles,
    SloTarget,
    SloTracker,
    WindowReport,
)

TARGETS = {"high": SloTarget(ttft_s=0.5, tpot_s=0.05), "low": SloTarget(ttft_s=5.0, tpot_s=0.2, e2e_s=60.0)}


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


def tracker(clock: Clock | None = None) -> SloTracker:
    return SloTracker(TARGETS, default_class="low", objective=0.9, clock=clock or Clock())


def served(slo_class: str = "high", path: Path = "local", ttft_s: float = 0.1, tpot_s: float | None = 0.01) -> Served:
    return Served(slo_class, path, ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=1.0)


def window(of: SloTracker, slo_class: str = "high", name: str = "5m") -> WindowReport:
    return of.report()[slo_class].windows[name]


@pytest.mark.parametrize(
    ("request_", "met"),
    [
        pytest.param(served(ttft_s=0.5), True, id="a TTFT equal to its SLO meets it"),
        pytest.param(served(ttft_s=0.51), False, id="a later first token misses"),
        pytest.param(served(tpot_s=0.06), False, id="slow tokens miss although the first was in time"),
        pytest.param(served(tpot_s=None), True, id="one token has no time per token to miss"),
        pytest.param(Served("low", "local", 0.1, 0.01, 61.0), False, id="an end-to-end SLO counts where there is one"),
        pytest.param(Served("high", "local", 0.1, 0.01, 9e9), True, id="what is not promised is not missed"),
    ],
)
def test_a_request_meets_its_slos_or_not(request_: Served, met: bool) -> None:
    assert tracker().served(request_).met is met


def test_refused_requests_lower_only_the_second_figure() -> None:
    slo = tracker()
    for _ in range(8):
        slo.served(served())
    slo.refused("high")
    slo.refused("high")
    report = window(slo)
    assert (report.served, report.met, report.refused) == (8, 8, 2)
    assert report.attainment == 1.0
    assert report.attainment_with_refused == pytest.approx(0.8)
    assert report.burn_rate == 0.0
    assert report.burn_rate_with_refused == pytest.approx(2.0)  # 20 % missed where 10 % are allowed


def test_without_requests_there_is_no_attainment_and_no_burn() -> None:
    report = window(tracker())
    assert (report.attainment, report.attainment_with_refused, report.burn_rate) == (None, None, None)


def test_a_burst_leaves_the_short_window_and_stays_in_the_long_one() -> None:
    clock = Clock()
    slo = tracker(clock)
    slo.served(served(ttft_s=9.0))
    clock.now_s += 400
    slo.served(served())
    assert window(slo, name="5m").burn_rate == 0.0
    assert window(slo, name="1h").burn_rate == pytest.approx(5.0)
    clock.now_s += 4000
    assert window(slo, name="1h").served == 0


def test_an_unknown_class_counts_under_the_default() -> None:
    slo = tracker()
    assert slo.served(served("tourist")).slo_class == "low"
    assert slo.refused(None) == "low"
    assert window(slo, "low").served == 1


def test_a_default_class_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'none' is not among high, low"):
        SloTracker(TARGETS, default_class="none")


def test_quantiles_are_kept_per_class_and_path() -> None:
    slo = tracker()
    for i in range(1, 101):
        slo.served(served(path="offloaded", ttft_s=i / 100))
        slo.served(served(path="local", ttft_s=7.0))
    quantiles = slo.report()["high"].quantiles_s
    assert quantiles["offloaded"]["ttft"][0.5] == pytest.approx(0.5, abs=0.02)
    assert quantiles["offloaded"]["ttft"][0.99] == pytest.approx(0.99, abs=0.02)
    assert quantiles["local"]["ttft"][0.99] == 7.0
    assert "fallback" not in quantiles


def test_old_values_leave_the_quantiles() -> None:
    sliding = SlidingQuantiles(300.0)
    sliding.add(0.0, 100.0)
    sliding.add(250.0, 1.0)
    assert sliding.quantiles(260.0)[0.99] == pytest.approx(100.0)
    assert sliding.quantiles(310.0) == {0.5: 1.0, 0.9: 1.0, 0.99: 1.0}
    assert sliding.quantiles(10_000.0) == {}


@given(st.lists(st.floats(1e-4, 1e3), min_size=50, max_size=400))
def test_a_quantile_lies_near_its_rank(values: list[float]) -> None:
    sliding = SlidingQuantiles(300.0)
    for i, value in enumerate(values):
        sliding.add(i * 290.0 / len(values), value)  # over all slots, so that merging is tested too
    ordered = sorted(values)
    for q, value in sliding.quantiles(290.0).items():
        low = ordered[max(0, math.floor((q - 0.05) * len(ordered)) - 1)]
        high = ordered[min(len(ordered) - 1, math.ceil((q + 0.05) * len(ordered)))]
        assert low <= value <= high or math.isclose(value, low) or math.isclose(value, high)


@given(st.lists(st.tuples(st.floats(0, 500), st.integers(0, 2)), max_size=60))
def test_counts_are_those_of_the_window_to_one_slot(steps: list[tuple[float, int]]) -> None:
    counts, happened, now_s = SlidingCounts(300.0, 3), [], 0.0
    for gap_s, which in steps:
        now_s += gap_s
        counts.add(now_s, which)
        happened.append((now_s, which))
        totals = counts.totals(now_s)
        surely = [w for at_s, w in happened if at_s > now_s - 290.0]
        perhaps = [w for at_s, w in happened if at_s > now_s - 300.1]
        for i in range(3):
            assert surely.count(i) <= totals[i] <= perhaps.count(i)


def test_a_clock_that_steps_back_loses_nothing() -> None:
    counts = SlidingCounts(300.0, 1)
    counts.add(1000.0, 0)
    counts.add(900.0, 0)
    assert counts.totals(1000.0) == (2,)


def test_memory_does_not_grow_with_requests() -> None:
    clock = Clock()
    slo = tracker(clock)
    for i in range(20_000):
        clock.now_s += 0.5
        slo.served(served(ttft_s=i / 20_000))
    assert len(slo._quantiles) == 3
    assert sum(len(c._slots) for windows in slo._windows.values() for c in windows.values()) == 2 * len(WINDOWS_S) * 30
