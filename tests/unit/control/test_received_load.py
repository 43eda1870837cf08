"""Whatever a prefill worker reports, decisions see numbers that make sense."""

import math
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.control.messages import LoadReport, PrefillSpeed
from disagg_plugin.control.received_load import ReceivedLoad
from disagg_policies.snapshots import PrefillModel, WorkerState

ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)
ANY_INT = st.integers(-(2**63), 2**64 - 1)
SPEED = st.builds(PrefillSpeed, ANY_FLOAT, ANY_FLOAT, ANY_FLOAT, ANY_INT, ANY_FLOAT)
REPORT = st.builds(LoadReport, ANY_INT, ANY_INT, ANY_INT, ANY_INT, ANY_FLOAT, ANY_FLOAT, st.none() | SPEED)
GOOD = LoadReport(1, 2, 3_000, 4, 0.5, 8_000.0, PrefillSpeed(0.01, 1e-4, 1e-9, 20, 0.1))


@given(st.lists(REPORT, min_size=1, max_size=5))
def test_no_report_makes_a_row_that_a_policy_cannot_take(reports: list[LoadReport]) -> None:
    load = ReceivedLoad()
    for report in reports:
        load = load.updated(report)
        numbers = [*astuple(load)[:5], *astuple(load.prefill)]
        assert all(math.isfinite(number) and number >= 0 for number in numbers)
        row = WorkerState(
            "p",
            healthy=True,
            queued_requests=load.queued_requests,
            max_prompt_tokens=1,
            queued_prefill_tokens=load.queued_prefill_tokens,
            running_requests=load.running_requests,
            kv_usage=load.kv_usage,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            prefill=load.prefill,
        )
        assert math.isfinite(row.queue_s)
        assert math.isfinite(row.prefill.seconds(1_000_000, 0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_a_value_without_sense_leaves_the_last_good_one(bad: float) -> None:
    good = ReceivedLoad().updated(GOOD)
    report = LoadReport(1, 9, 3_000, 4, math.nan, bad, PrefillSpeed(0.01, bad if bad else math.nan, 1e-9, 20, 0.1))
    load = good.updated(report)
    assert (load.queued_requests, load.kv_usage, load.prefill_tokens_per_s) == (9, 0.5, 8_000.0)
    assert load.prefill == good.prefill == PrefillModel(0.01, 1e-4, 1e-9, 20, 0.1)


def test_a_worker_that_has_measured_nothing_is_assumed_to_be_like_us() -> None:
    ours = PrefillModel(0.004, 5e-5, 1e-9, samples=300, error=0.05)
    fresh = ReceivedLoad().updated(LoadReport(1, 0, 0, 0, 0.0, 1_000.0, PrefillSpeed(0.005, 1e-3, 2e-8, 0, 0.0)))
    assumed = fresh.assuming(ours)
    assert (assumed.prefill.per_token_s, assumed.prefill.samples) == (5e-5, 0)
    assert assumed.prefill_tokens_per_s == pytest.approx(20_000)
    measured = ReceivedLoad().updated(GOOD)
    assert measured.assuming(ours) == measured
    assert fresh.assuming(None) == fresh


def test_the_first_prefills_of_a_process_do_not_decide_whether_it_is_ever_asked_again() -> None:
    """They are slow: kernels, page-ins. A worker that is taken for slow gets no prompt, and so no better figure."""
    ours = PrefillModel(0.004, 5e-5, 1e-9, samples=300, error=0.05)
    slow = PrefillSpeed(0.5, 1e-2, 1e-9, 4, 0.0)
    cold = ReceivedLoad().updated(LoadReport(1, 0, 0, 0, 0.0, 100.0, slow))
    assert cold.assuming(ours).prefill.per_token_s == 5e-5
    slow_indeed = PrefillSpeed(0.5, 1e-2, 1e-9, 5, 0.0)
    known = ReceivedLoad().updated(LoadReport(1, 0, 0, 0, 0.0, 100.0, slow_indeed))
    assert known.assuming(ours).prefill.per_token_s == 1e-2
