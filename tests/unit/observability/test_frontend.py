"""The API server's half: what a finished, refused or aborted request counts as."""

import json
import math

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from disagg_plugin.observability.deltas import Deltas
from disagg_plugin.observability.frontend import MAX_JOINED, Frontend
from disagg_plugin.observability.journal import FOR_DECODE
from disagg_plugin.observability.metrics import MetricSet, make_instrument
from disagg_plugin.observability.slo import SloTarget

TARGETS = {"high": SloTarget(ttft_s=0.5, tpot_s=0.05), "low": SloTarget(ttft_s=5.0)}


class Bench:
    def __init__(self, *, sees_all_stats: bool = True) -> None:
        self.registry = CollectorRegistry()
        self.now_s = 0.0
        classes = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        metrics = MetricSet(lambda metric: make_instrument(metric, classes, registry=self.registry))
        self.frontend = Frontend(metrics, model_name="tiny", clock=lambda: self.now_s, sees_all_stats=sees_all_stats)
        self.frontend.configure_slo(TARGETS, default_class="low", objective=0.9)

    def finish(self, request_id: str, ttft_s: float = 0.2) -> None:
        self.frontend.finished(request_id, ttft_s=ttft_s, tpot_s=0.01, e2e_s=1.0)

    def sample(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {"model_name": "tiny", **labels})

    def outcomes(self, slo_class: str, path: str, outcome: str) -> float | None:
        return self.sample("disagg_slo_requests_total", slo_class=slo_class, path=path, outcome=outcome)


def test_a_request_counts_under_the_class_and_path_that_were_noted():
    bench = Bench()
    bench.frontend.classify("a", "high")
    bench.frontend.note("a", "offloaded", 0.1)
    bench.finish("a", ttft_s=0.2)
    assert bench.outcomes("high", "offloaded", "met") == 1
    assert bench.sample("disagg_ttft_seconds_sum", slo_class="high", path="offloaded") == 0.2
    assert bench.sample("disagg_ttft_estimate_ratio_sum", path="offloaded") == 2.0
    assert bench.sample("disagg_ttft_estimated_seconds_sum", path="offloaded") == 0.1


def test_after_a_fallback_the_estimate_of_the_offload_no_longer_counts():
    bench = Bench()
    bench.frontend.note("a", "offloaded", 0.1)
    bench.frontend.note("a", "fallback", None)
    bench.finish("a", ttft_s=9.0)
    assert bench.outcomes("low", "fallback", "missed") == 1
    assert bench.sample("disagg_slo_missed_total", slo_class="low", path="fallback", slo="ttft") == 1
    assert bench.sample("disagg_ttft_estimate_ratio_count", path="fallback") is None


@pytest.mark.parametrize(
    ("sees_all", "path"),
    [
        pytest.param(True, "local", id="the only API server: a request without a note was prefilled here"),
        pytest.param(False, "unknown", id="one of several: its note may have gone to another one"),
    ],
)
def test_a_request_without_a_note(sees_all: bool, path: str):
    bench = Bench(sees_all_stats=sees_all)
    bench.finish("a")
    assert bench.outcomes("low", path, "met") == 1


def test_a_prefill_for_a_decode_engine_is_in_nobodys_slo():
    bench = Bench()
    bench.frontend.note("a", FOR_DECODE, None)
    bench.finish("a", ttft_s=99.0)
    bench.frontend.aborted("a")
    bench.frontend.failed("a")
    assert bench.frontend.slo.report()["low"].windows["5m"].served == 0
    assert bench.sample("disagg_ttft_seconds_count", slo_class="low", path=FOR_DECODE) is None


def test_a_request_for_several_completions_ends_several_times():
    bench = Bench()
    bench.frontend.note("a", "offloaded", None)
    bench.finish("a")
    bench.finish("a")
    assert bench.outcomes("low", "offloaded", "met") == 2


def test_a_client_that_goes_away_is_neither_met_nor_missed_and_an_error_is_a_miss():
    bench = Bench()
    bench.frontend.aborted("a")
    bench.frontend.failed("b")
    report = bench.frontend.slo.report()["low"].windows["5m"]
    assert (report.served, report.met) == (1, 0)
    assert bench.outcomes("low", "local", "aborted") == 1
    assert bench.outcomes("low", "local", "error") == 1


def test_admission_counts_by_class_and_reason_and_refusals_lower_the_second_attainment():
    bench = Bench()
    bench.frontend.classify("a", "high")
    bench.frontend.admitted("high")
    bench.finish("a")
    bench.frontend.refused("high", "ttft")
    bench.frontend.degraded("low", "max_tokens")
    bench.frontend.degradation_level("low", 2)
    bench.frontend.refresh()
    assert bench.sample("disagg_admission_total", slo_class="high", outcome="refused", reason="ttft") == 1
    assert bench.sample("disagg_admission_total", slo_class="high", outcome="admitted", reason="") == 1
    assert bench.sample("disagg_degradations_total", slo_class="low", step="max_tokens") == 1
    assert bench.sample("disagg_degradation_level", slo_class="low") == 2
    attained = {
        refused: bench.sample("disagg_slo_attainment_ratio", slo_class="high", window="5m", refused=refused)
        for refused in ("excluded", "missed")
    }
    assert attained == {"excluded": 1.0, "missed": 0.5}
    assert bench.sample("disagg_slo_burn_rate", slo_class="high", window="5m", refused="missed") == pytest.approx(5)


def test_attainment_of_nobody_is_no_number_rather_than_good_or_bad():
    bench = Bench()
    bench.frontend.refresh()
    attained = bench.sample("disagg_slo_attainment_ratio", slo_class="high", window="1h", refused="excluded")
    assert attained is not None
    assert math.isnan(attained)


def test_gauges_are_brought_up_to_date_once_a_second():
    bench = Bench()
    bench.frontend.refresh()
    bench.finish("a")
    bench.now_s = 0.5
    bench.frontend.refresh()
    labels = {"slo_class": "low", "path": "local", "what": "ttft", "q": "0.5"}
    assert bench.sample("disagg_latency_quantile_seconds", **labels) is None
    bench.now_s = 1.0
    bench.frontend.refresh()
    assert bench.sample("disagg_latency_quantile_seconds", **labels) == pytest.approx(0.2)


def test_what_is_remembered_about_requests_is_bounded():
    bench = Bench()
    for i in range(MAX_JOINED + 10):
        bench.frontend.note(f"r{i}", "offloaded", None)
        bench.frontend.classify(f"r{i}", "high")
    bench.finish("r0")
    bench.finish(f"r{MAX_JOINED}")
    assert bench.outcomes("low", "local", "met") == 1
    assert bench.outcomes("high", "offloaded", "met") == 1


def test_the_status_is_json_and_holds_what_the_engines_said():
    bench = Bench()
    deltas = Deltas()
    deltas.count("disagg_fallbacks_total", "peer_lost", by=2)
    deltas.set_engine_state({"queued": 3})
    bench.frontend.engine_said(deltas, 1)
    bench.frontend.engine_said(Deltas({"counters": {"disagg_fallbacks_total\x1fpeer_lost": 1.0}}), 1)
    bench.frontend.refused("high", "ttft")
    bench.finish("a")
    status = json.loads(json.dumps(bench.frontend.status()))
    assert status["engines"]["1"]["counters"] == {"disagg_fallbacks_total{peer_lost}": 3}
    assert status["engines"]["1"]["engine_state"] == {"queued": 3}
    assert status["classes"]["high"]["windows"]["5m"]["refused"] == 1
    assert status["classes"]["low"]["quantiles_s"]["local"]["ttft"]["0.5"] == pytest.approx(0.2)
