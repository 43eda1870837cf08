"""The examples' queries, rules and dashboard, judged by a real Prometheus that scrapes the real definitions."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.exposition import generate_latest
from prometheus_server import Prometheus, binaries, dashboard_queries, prometheus, promtool
from synthetic import SyntheticEngine

from disagg_plugin.observability.metrics import METRICS

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples/observability"
ALERTS = EXAMPLES / "alerts.yml"
DASHBOARD = EXAMPLES / "grafana-dashboard.json"
QUERIES = dashboard_queries(DASHBOARD)
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
METRIC = re.compile(r"\bdisagg_[a-z0-9_]+\b")
ENGINE_METRIC = re.compile(r"vllm\[:_\][a-z0-9_]+")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus after it has seen a synthetic engine serve requests."""
    engine = SyntheticEngine()
    _traffic(engine)  # a rate begins with a series' second sample
    engine.touch_everything()
    engine.view["inactive_reason"] = "for the panel that says why"
    with engine.serving() as url, prometheus(tmp_path_factory.mktemp("prometheus"), [url], rules=[ALERTS]) as server:
        server.when(lambda: server.scraped(3))
        _traffic(engine)
        server.when(lambda: len(server.query("disagg:slo_burn:rate5m > 0")) > 0)
        yield server


def _traffic(engine: SyntheticEngine) -> None:
    engine.requests(5)
    engine.requests(5, path="offloaded", slo_class="high")
    engine.requests(2, path="fallback")
    engine.frontend.refused("high", "ttft")


@pytest.mark.parametrize("panel", QUERIES)
def test_every_panel_shows_something(server: Prometheus, panel: str):
    assert server.query(QUERIES[panel]), QUERIES[panel]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_every_rule_asks_for_metrics_that_exist(server: Prometheus, rule: dict[str, Any]):
    server.query(rule["expr"])
    for name in METRIC.findall(rule["expr"]):
        assert server.query(f'count({{__name__="{name}"}})'), name


def test_prometheus_evaluates_all_rules_without_complaint(server: Prometheus):
    groups = server.get("rules")["groups"]
    assert sum(len(group["rules"]) for group in groups) == len(RULES)
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}


def test_the_burn_rate_of_a_class_that_refused_and_missed_is_above_1(server: Prometheus):
    burns = {
        series["metric"]["slo_class"]: float(series["value"][1]) for series in server.query("disagg:slo_burn:rate5m")
    }
    assert burns["normal"] == 0.0
    assert burns["high"] > 1.0


def test_alerts_fire_when_they_should_and_only_then():
    promtool("check", "rules", ALERTS)
    promtool("test", "rules", EXAMPLES / "alerts_test.yml")


def test_the_example_configuration_is_valid():
    promtool("check", "config", EXAMPLES / "prometheus.yml")


def test_prometheus_own_linter_accepts_the_exposition():
    engine = SyntheticEngine()
    engine.requests(3, path="offloaded")
    engine.touch_everything()
    text = generate_latest(engine.registry)
    ours = b"\n".join(line for line in text.splitlines() if b"vllm:" not in line) + b"\n"
    done = subprocess.run([binaries() / "promtool", "check", "metrics"], input=ours, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_is_on_the_dashboard_or_in_a_rule():
    used = {name for text in (*QUERIES.values(), *(rule["expr"] for rule in RULES)) for name in METRIC.findall(text)}
    used = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    beside = {
        "disagg_ttft_estimated_seconds",  # beside the ratio, for those who want both
        "disagg_slo_missed_total",
        "disagg_slo_target_seconds",
        "disagg_slo_attainment_ratio",  # for `disagg status`: the dashboard computes its own over all API servers
        "disagg_slo_burn_rate",
        "disagg_latency_quantile_seconds",
        "disagg_peer_queued_requests",
        "disagg_offers_answered_total",
        "disagg_side_channel_messages_total",
        "disagg_chunks_total",
        "disagg_guard_demotions_total",
        "disagg_observations_dropped_total",
    }
    assert {name for name in used if name.startswith("disagg_")} <= METRICS.keys()
    assert METRICS.keys() - used == beside


def test_the_dashboard_is_the_one_that_its_tool_writes():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from dashboard import dashboard
    finally:
        sys.path.pop(0)
    assert json.loads(DASHBOARD.read_text()) == dashboard(), "run python tools/dashboard.py"
