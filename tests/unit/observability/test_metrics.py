"""The table of metrics, and the instruments made of it, with prometheus_client's own text as the judge."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from disagg_plugin.observability import collect
from disagg_plugin.observability.deltas import Deltas
from disagg_plugin.observability.metrics import MAX_SERIES, METRICS, Metric, MetricSet, make_instrument

BASE = ("tiny", "0")


class Exposed:
    """A metric set in a registry of its own, and what a scrape of it says."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        classes = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        self.metrics = MetricSet(lambda metric: make_instrument(metric, classes, registry=self.registry))

    def sample(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {"model_name": "tiny", "engine": "0", **labels})


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_names_follow_the_conventions(metric: Metric):
    assert metric.name.startswith("disagg_")
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert not any(unit in metric.name for unit in ("_ms", "_us", "milli", "_mb", "percent"))
    assert metric.help.endswith(".")
    assert list(metric.buckets) == sorted(set(metric.buckets))


def test_what_the_collector_sends_is_in_the_table():
    for target in (*collect.RANK_COUNTERS.values(), *collect.CHANNEL_COUNTERS.values()):
        name, *labels = target
        assert len(labels) == len(METRICS[name].labels), name


def test_a_scrape_is_parsed_by_prometheus_own_parser():
    exposed = Exposed()
    for metric in METRICS.values():
        base = BASE[: len(metric.base_labels)]
        labels = [f'{label} "\\\n' for label in metric.labels]
        if metric.kind == "counter":
            exposed.metrics.count(metric.name, base, *labels)
        elif metric.kind == "gauge":
            exposed.metrics.set(metric.name, base, *labels, to=1)
        else:
            exposed.metrics.observe(metric.name, base, *labels, value=0.1)
    text = generate_latest(exposed.registry).decode()
    families = {family.name for family in text_string_to_metric_families(text)}
    assert {metric.name.removesuffix("_total") for metric in METRICS.values()} <= families


def test_a_histogram_sent_in_buckets_comes_out_as_if_every_value_had_been_observed():
    directly, sent, deltas = Exposed(), Exposed(), Deltas()
    buckets = METRICS["disagg_transfer_seconds"].buckets
    for value in (0.001, 0.0011, 0.3, 0.3, 0.7, 100.0):
        directly.metrics.observe("disagg_transfer_seconds", BASE, "total", value=value)
        deltas.observe("disagg_transfer_seconds", "total", value=value, buckets=buckets)
    sent.metrics.apply(deltas, BASE)
    for bound in (*map(str, buckets), "+Inf"):
        name = "disagg_transfer_seconds_bucket"
        assert sent.sample(name, phase="total", le=bound) == directly.sample(name, phase="total", le=bound)
    assert sent.sample("disagg_transfer_seconds_sum", phase="total") == pytest.approx(101.3021)


def test_of_an_exclusive_gauge_only_the_newest_series_is_1():
    exposed = Exposed()
    exposed.metrics.set("disagg_inactive", BASE, "not started", to=1)
    exposed.metrics.set("disagg_inactive", BASE, "the model has layers of kind mamba", to=1)
    assert exposed.sample("disagg_inactive", reason="not started") == 0
    assert exposed.sample("disagg_inactive", reason="the model has layers of kind mamba") == 1


def test_series_beyond_the_limit_count_together():
    exposed = Exposed()
    for i in range(MAX_SERIES + 50):
        exposed.metrics.count("disagg_decisions_total", BASE, f"reason {i}")
    assert exposed.sample("disagg_decisions_total", reason="other") == 50
    assert exposed.sample("disagg_decisions_total", reason="reason 0") == 1


@pytest.mark.parametrize(
    "deltas",
    [
        pytest.param({"counters": {"disagg_unheard_of_total": 1.0}}, id="an unknown name"),
        pytest.param({"counters": {"disagg_decisions_total": 1.0}}, id="labels missing"),
        pytest.param({"gauges": {"disagg_decisions_total\x1fx": 1.0}}, id="another kind"),
        pytest.param({"counters": {"disagg_decisions_total\x1fx": -1.0}}, id="a counter that falls"),
    ],
)
def test_what_another_version_sends_is_left_out(deltas: dict[str, dict[str, float]]):
    exposed = Exposed()
    exposed.metrics.apply(Deltas(deltas), BASE)
    assert exposed.sample("disagg_decisions_total", reason="x") is None


def test_counters_of_several_api_servers_add_up(tmp_path: Path):
    script = (
        "import sys\n"
        "from prometheus_client import Counter, Gauge, Histogram\n"
        "from disagg_plugin.observability.metrics import MetricSet, make_instrument\n"
        "classes = {'counter': Counter, 'gauge': Gauge, 'histogram': Histogram}\n"
        "metrics = MetricSet(lambda metric: make_instrument(metric, classes))\n"
        "metrics.count('disagg_decisions_total', ('tiny', '0'), 'short_prompt', by=int(sys.argv[1]))\n"
        "metrics.set('disagg_active', ('tiny', '0'), to=1)\n"
        "metrics.observe('disagg_ttft_seconds', ('tiny',), 'high', 'local', value=0.2)\n"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for increments in ("2", "3"):
        subprocess.run([sys.executable, "-c", script, increments], env=environment, check=True)
    read = (
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess\n"
        "registry = CollectorRegistry()\n"
        "multiprocess.MultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode())\n"
    )
    done = subprocess.run([sys.executable, "-c", read], env=environment, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert 'disagg_decisions_total{engine="0",model_name="tiny",reason="short_prompt"} 5.0' in lines
    assert 'disagg_active{engine="0",model_name="tiny"} 1.0' in lines
    assert 'disagg_ttft_seconds_count{model_name="tiny",path="local",slo_class="high"} 2.0' in lines
