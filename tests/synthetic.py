"""An engine's /metrics without an engine: the real definitions, collector and front-end, fed with made-up traffic."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from disagg_plugin.observability.buckets import CHUNK_SCATTER, CHUNK_SECONDS, CHUNK_WRITE, add_duration
from disagg_plugin.observability.collect import Collector
from disagg_plugin.observability.frontend import Frontend
from disagg_plugin.observability.journal import Journal
from disagg_plugin.observability.metrics import METRICS, MetricSet, make_instrument
from disagg_plugin.observability.slo import SloTarget

CLASSES = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
TARGETS = {"high": SloTarget(ttft_s=0.5, tpot_s=0.05), "normal": SloTarget(ttft_s=2.0, tpot_s=0.1)}


class SyntheticEngine:
    """A decode engine with one prefill worker, on the wall clock."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        metrics = MetricSet(lambda metric: make_instrument(metric, CLASSES, registry=self.registry))
        self.frontend = Frontend(metrics, model_name="tiny")
        self.frontend.configure_slo(TARGETS, default_class="normal")
        self.journal = Journal()
        self.counters: dict[str, float] = {}
        self.view: dict[str, Any] = {
            "inactive_reason": "",
            "decode": {"decisions": {}, "fallbacks": {}, "totals": {}, "ranks": {"0": self.counters}},
            "prefill": {"totals": {}, "drops": {}, "peers": {"d:1": 1}},
            "prefill_workers": {"counters": {}, "workers": {"p:1": {"healthy": True, "queued_requests": 2}}},
            "prefill_service": {"accepted": 1},
            "lmcache": {"inactive_reason": "", "totals": {"store_hit_tokens": 64, "lookups": 1}},
            "side_channel": {"messages_in": 5, "rejected_auth": 1},
            "draining": False,
        }
        self.collector = Collector(lambda: self.view, self.journal, interval_s=0.01, ring_slots=8, private_buffers=8)
        self._requests = 0
        vllm = {"registry": self.registry, "labelnames": ["model_name", "engine"]}
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            Gauge(f"vllm:{name}", name, **vllm).labels("tiny", "0").set(0.25)
        for name in ("prefix_cache_hits", "prefix_cache_queries"):
            Counter(f"vllm:{name}", name, **vllm).labels("tiny", "0").inc(10)

    def requests(self, count: int, *, path: str = "local", slo_class: str = "normal", ttft_s: float = 0.2) -> None:
        """So many requests go through, decided, transferred and finished."""
        decode = self.view["decode"]
        for _ in range(count):
            self._requests += 1
            name = f"r{self._requests}"
            self.frontend.classify(name, slo_class)
            self.journal.decided(name, "local" if path == "local" else "offloaded", ttft_s * 1.1)
            reason = "short_prompt" if path == "local" else "over_threshold"
            _more(decode["decisions"], reason)
            if path != "local":
                self._transfer(fails=path == "fallback")
            if path == "fallback":
                self.journal.fell_back(name)
            self.step()
            self.frontend.admitted(slo_class)
            self.frontend.finished(name, ttft_s=ttft_s, tpot_s=0.02, e2e_s=1.0)
        self.frontend.refresh()

    def _transfer(self, *, fails: bool) -> None:
        decode = self.view["decode"]
        _more(decode["totals"], "offered")
        if fails:
            _more(decode["fallbacks"], "peer_lost")
            return
        _more(decode["totals"], "landed")
        for counter, by in (("chunks_received", 4), ("wire_bytes_received", 4e6), ("raw_bytes_received", 8e6)):
            self.counters[counter] = self.counters.get(counter, 0) + by
        add_duration(self.counters, CHUNK_WRITE, 0.002, CHUNK_SECONDS)
        add_duration(self.counters, CHUNK_SCATTER, 0.004, CHUNK_SECONDS)
        now_s = time.monotonic()
        fields = ("offered_s", "accepted_s", "started_s", "first_chunk_s", "last_chunk_s", "landed_s")
        self.journal.transfer_over("decode", {field: now_s + i / 100 for i, field in enumerate(fields)})

    def step(self) -> None:
        """One engine step: its figures reach the front-end."""
        deltas = self.collector.collect(at_rest=True)
        assert deltas is not None
        for name, (path, estimated_s) in deltas.notes():
            self.frontend.note(name, path, estimated_s)
        self.frontend.engine_said(deltas)

    def touch_everything(self) -> None:
        """Every metric gets a sample, so that no query is empty for want of an event that did not happen."""
        metrics = self.frontend._metrics
        for metric in METRICS.values():
            base = ("tiny", "0")[: len(metric.base_labels)]
            labels = ["none"] * len(metric.labels)
            if metric.kind == "counter":
                metrics.count(metric.name, base, *labels, by=0)
            elif metric.kind == "gauge" and not metric.exclusive and metric.labels:
                metrics.set(metric.name, base, *labels, to=0)
            elif metric.kind == "histogram":
                metrics.observe(metric.name, base, *labels, value=0.01)

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Its address while it can be scraped."""
        server, thread = start_http_server(0, addr="127.0.0.1", registry=self.registry)
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _more(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1
