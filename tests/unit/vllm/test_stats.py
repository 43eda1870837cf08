"""Figures on their way through vLLM's own classes: stats channel, stat logger, Prometheus metrics, listeners."""

import warnings
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from disagg_plugin.observability.deltas import Deltas, series_key
from disagg_plugin.observability.metrics import MetricSet, make_instrument

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when vLLM imports its compiler
    from vllm.v1.engine import FinishReason
    from vllm.v1.metrics.loggers import StatLoggerBase
    from vllm.v1.metrics.stats import IterationStats, RequestStateStats, SchedulerStats
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    from disagg_vllm import stats
    from disagg_vllm.settings import names_disagg
    from disagg_vllm.stat_logger import DisaggStatLogger
    from disagg_vllm.stats import DisaggPromMetrics, DisaggStats, build_stats, external_ids, find_ours

TYPES = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
FALLBACKS = series_key("disagg_fallbacks_total", "peer_lost")


def config(connector: str | None = "disagg", api_servers: int = 1, **extra: Any) -> Any:
    transfer = SimpleNamespace(kv_connector=connector, kv_connector_extra_config=extra)
    return SimpleNamespace(
        kv_transfer_config=transfer if connector else None,
        parallel_config=SimpleNamespace(_api_process_count=api_servers),
        model_config=SimpleNamespace(served_model_name="tiny"),
    )


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    """An API server process of its own: no instruments, no frontend, no listeners."""
    registry = CollectorRegistry()
    classes = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
    own = MetricSet(lambda metric: make_instrument(metric, classes, registry=registry))
    monkeypatch.setattr(stats, "_metric_set", own)
    monkeypatch.setattr(stats, "_frontend", None)
    monkeypatch.setattr(stats, "_listeners", [])
    return registry


def stat_logger(vllm_config: Any) -> Any:
    return DisaggStatLogger(vllm_config)


def finished(request_id: str, reason: str = "LENGTH", tokens: int = 11) -> Any:
    iteration = IterationStats()
    state = RequestStateStats(
        num_generation_tokens=tokens,
        arrival_time=iteration.iteration_timestamp - 2.0,
        first_token_ts=50.0,
        last_token_ts=51.5,
    )
    iteration.update_from_finished_request(
        finish_reason=FinishReason[reason],
        request_id=request_id,
        num_prompt_tokens=100,
        max_tokens_param=None,
        req_stats=state,
    )
    return iteration


def step(**data: Any) -> Any:
    return SchedulerStats(kv_connector_stats=data or None)


def test_the_steps_of_an_interval_become_one():
    first, second = Deltas(), Deltas()
    first.count("disagg_fallbacks_total", "peer_lost")
    second.count("disagg_fallbacks_total", "peer_lost", by=2)
    total = DisaggStats(first.data).aggregate(DisaggStats(second.data))
    assert total.deltas.counters == {FALLBACKS: 3}
    assert total.reduce()["fallbacks"] == 3
    assert not total.is_empty()
    total.reset()
    assert total.is_empty()


def test_rebuilt_stats_own_their_data():
    sent = {"counters": {FALLBACKS: 1.0}}
    build_stats(sent).aggregate(build_stats(sent)).aggregate(build_stats(sent))
    assert sent == {"counters": {FALLBACKS: 1.0}}
    assert build_stats(None).is_empty()


def test_what_a_worker_and_a_scheduler_send_survives_vllms_own_encoder():
    deltas = Deltas()
    deltas.count("disagg_fallbacks_total", "peer_lost")
    deltas.note("r1", "offloaded", 0.25)
    deltas.observe("disagg_transfer_seconds", "total", value=0.2, buckets=(0.1, 1.0))
    deltas.set_engine_state({"queued": 3})
    sent = MsgpackEncoder().encode(step(**deltas.data))
    assert MsgpackDecoder(SchedulerStats).decode(sent).kv_connector_stats == deltas.data


def test_metrics_and_engine_state_arrive(registry: CollectorRegistry):
    heard: list[tuple[int, Mapping[str, Any]]] = []
    stop = stats.on_engine_state(lambda engine, state: heard.append((engine, state)))
    metrics = DisaggPromMetrics(config(), TYPES, ["model_name", "engine"], {1: ["tiny", "1"]})
    metrics.observe({"counters": {FALLBACKS: 2.0}, "engine_state": {"queued": 3}}, 1)
    stop()
    metrics.observe({"engine_state": {"queued": 4}}, 1)
    labels = {"model_name": "tiny", "engine": "1", "cause": "peer_lost"}
    assert registry.get_sample_value("disagg_fallbacks_total", labels) == 2
    assert heard == [(1, {"queued": 3})]


@pytest.mark.usefixtures("registry")
def test_a_listener_that_raises_harms_nobody_else():
    heard = []

    def broken(_engine: int, _state: Mapping[str, Any]) -> None:
        raise ValueError("mine")

    stats.on_engine_state(broken)
    stats.on_engine_state(lambda _engine, state: heard.append(state))
    DisaggPromMetrics(config(), TYPES, [], {}).observe({"engine_state": {"queued": 3}})
    assert heard == [{"queued": 3}]


def test_a_finished_request_is_joined_with_what_its_engine_noted(registry: CollectorRegistry):
    logger = stat_logger(config())
    logger.record(step(notes={"cmpl-x-0-0123abcd": ["offloaded", 0.25]}), None)
    logger.record(None, finished("cmpl-x-0"))
    labels = {"model_name": "tiny", "slo_class": "normal", "path": "offloaded"}
    assert registry.get_sample_value("disagg_ttft_seconds_sum", labels) == pytest.approx(0.5)
    assert registry.get_sample_value("disagg_e2e_seconds_sum", labels) == pytest.approx(2.0)
    assert registry.get_sample_value("disagg_tpot_seconds_sum", labels) == pytest.approx(0.15)


def test_a_note_that_comes_with_the_end_of_its_request_is_in_time(registry: CollectorRegistry):
    stat_logger(config()).record(step(notes={"cmpl-x-0-0123abcd": ["fallback", None]}), finished("cmpl-x-0"))
    labels = {"model_name": "tiny", "slo_class": "normal", "path": "fallback", "outcome": "met"}
    assert registry.get_sample_value("disagg_slo_requests_total", labels) == 1


@pytest.mark.parametrize(
    ("reason", "tokens", "outcome"),
    [("STOP", 5, "met"), ("ABORT", 5, "aborted"), ("ERROR", 5, "error"), ("LENGTH", 0, "aborted")],
)
def test_how_a_request_ended_decides_what_it_counts_as(
    registry: CollectorRegistry, reason: str, tokens: int, outcome: str
):
    stat_logger(config()).record(None, finished("cmpl-x-0", reason, tokens))
    labels = {"model_name": "tiny", "slo_class": "normal", "path": "local", "outcome": outcome}
    assert registry.get_sample_value("disagg_slo_requests_total", labels) == 1


def test_one_token_has_no_time_per_token(registry: CollectorRegistry):
    stat_logger(config()).record(None, finished("cmpl-x-0", tokens=1))
    labels = {"model_name": "tiny", "slo_class": "normal", "path": "local"}
    assert registry.get_sample_value("disagg_tpot_seconds_count", labels) is None


def test_among_several_api_servers_a_request_without_a_note_has_an_unknown_path(registry: CollectorRegistry):
    stat_logger(config(api_servers=2)).record(None, finished("cmpl-x-0"))
    labels = {"model_name": "tiny", "slo_class": "normal", "path": "unknown", "outcome": "met"}
    assert registry.get_sample_value("disagg_slo_requests_total", labels) == 1


def test_the_objective_stands_beside_the_outcomes_before_the_first_request(registry: CollectorRegistry):
    stat_logger(config(observability={"slo_objective": 0.99}))
    assert registry.get_sample_value("disagg_slo_objective_ratio", {"model_name": "tiny"}) == 0.99


def test_settings_that_cannot_be_read_leave_the_objective_at_its_default(registry: CollectorRegistry):
    stat_logger(config(observability={"slo_objective": 7}))
    assert registry.get_sample_value("disagg_slo_objective_ratio", {"model_name": "tiny"}) == 0.95


@pytest.mark.usefixtures("registry")
def test_without_the_connector_the_stat_logger_does_nothing():
    logger = stat_logger(config(None))
    logger.record(step(notes={"r": ["local", None]}), finished("r"))
    logger.log()
    assert stats.frontend() is None


@pytest.mark.usefixtures("registry")
def test_an_error_in_the_stat_logger_does_not_reach_vllm():
    stat_logger(config()).record(step(notes={"r": "nonsense"}), None)


def test_vllm_accepts_the_stat_logger_as_a_plugin():
    entry = EntryPoint("disagg", "disagg_vllm.stat_logger:DisaggStatLogger", "vllm.stat_logger_plugins")
    assert issubclass(entry.load(), StatLoggerBase)


@pytest.mark.parametrize(
    ("internal", "known_as"),
    [
        pytest.param("cmpl-1f-0-0123abcd", ("cmpl-1f-0",), id="vLLM appends eight random characters"),
        pytest.param("2_cmpl-1f-0-0123abcd", ("2_cmpl-1f-0", "cmpl-1f-0"), id="the third of several completions"),
        pytest.param("cmpl-1f-0", ("cmpl-1f-0",), id="nothing was appended"),
    ],
)
def test_the_ids_under_which_the_api_server_knows_a_request(internal: str, known_as: tuple[str, ...]):
    assert external_ids(internal) == known_as


def test_ids_stay_as_they_are_where_vllm_was_told_so():
    assert external_ids("cmpl-deadbeef", randomized=False) == ("cmpl-deadbeef",)


@pytest.mark.parametrize(
    ("vllm_config", "named"),
    [
        (config("disagg"), True),
        (config("DisaggConnector"), True),
        (config("NixlConnector"), False),
        (config(None), False),
        (config("MultiConnector", connectors=[{"kv_connector": "disagg"}, {"kv_connector": "X"}]), True),
    ],
)
def test_whether_an_engine_uses_the_connector(vllm_config: Any, named: bool):
    assert names_disagg(vllm_config) is named


def test_a_multi_connectors_statistics_hold_ours_under_our_class_name():
    ours = {"counters": {FALLBACKS: 1.0}}
    assert find_ours({"DisaggConnector": ours, "NixlConnector": {"x": []}}) == [ours]
    assert find_ours(ours) == [ours]
    assert find_ours(None) == []
