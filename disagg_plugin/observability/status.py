"""What one engine's /metrics say about the plugin, put together for a person: ``disagg status``. No I/O."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

Labels = Mapping[str, str]
View = dict[str, Any]

# an engine's own figures: what we call them → its metric names, the first that is there
QUEUES = {
    "running": ("vllm:num_requests_running", "sglang:num_running_reqs"),
    "waiting": ("vllm:num_requests_waiting", "sglang:num_queue_reqs"),
}
CACHES = (
    ("own prefix cache", "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
    ("from others", "vllm:external_prefix_cache_hits_total", "vllm:external_prefix_cache_queries_total"),
    ("prefix cache", "sglang:cached_tokens_total", "sglang:prompt_tokens_total"),  # what others computed is in it too
)
KV_USAGE = ("vllm:kv_cache_usage_perc", "sglang:token_usage")


class Scrape:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        """
        Raises:
            ValueError: It is not Prometheus' text format.
        """
        self.known = False  # whether the plugin's metrics exist at all
        self._samples: dict[str, list[tuple[Labels, float]]] = {}
        for family in text_string_to_metric_families(text):
            self.known = self.known or family.name.startswith("disagg_")
            for sample in family.samples:
                self._samples.setdefault(sample.name, []).append((sample.labels, sample.value))

    def __contains__(self, name: str) -> bool:
        return name in self._samples

    def samples(self, name: str, **labels: str) -> Iterable[tuple[Labels, float]]:
        """Those with these labels; NaN is left out."""
        for own, value in self._samples.get(name, ()):
            if value == value and all(own.get(label) == wanted for label, wanted in labels.items()):
                yield own, value

    def total(self, name: str, **labels: str) -> float:
        """The sum over all other labels."""
        return sum(value for _, value in self.samples(name, **labels))

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Sums per value of one label, the largest first."""
        sums: dict[str, float] = {}
        for own, value in self.samples(name, **labels):
            sums[own.get(label, "")] = sums.get(own.get(label, ""), 0) + value
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def status_of(scrape: Scrape, *, now_s: float) -> View:
    """The view as JSON values; engines of one scrape (data parallel) are added up."""
    stamps = [value for _, value in scrape.samples("disagg_stats_timestamp_seconds")]
    return {
        "active": scrape.total("disagg_active") > 0 if "disagg_active" in scrape else None,
        "inactive_reasons": [r for r, on in scrape.by("disagg_inactive", "reason").items() if on],
        "draining": scrape.total("disagg_draining") > 0,
        "stats_age_s": round(max(0.0, now_s - max(stamps)), 1) if stamps else None,
        "classes": _classes(scrape),
        "queues": _queues(scrape),
        "decisions": _counts(scrape.by("disagg_decisions_total", "reason")),
        "policy_errors": _counts(scrape.by("disagg_policy_errors_total", "policy")),
        "fallbacks": _counts(scrape.by("disagg_fallbacks_total", "cause")),
        "offload_failures": _counts(scrape.by("disagg_offload_failures_total", "reason")),
        "admission": _admission(scrape),
        "peers": _peers(scrape),
        "peer_states": {
            role: _counts(scrape.by("disagg_peers", "state", role=role))
            for role in sorted(scrape.by("disagg_peers", "role"))
        },
        "transfers": _transfers(scrape),
        "cache_hits": _cache_hits(scrape),
        "prefix_tokens": _counts(scrape.by("disagg_prefix_tokens_total", "tier")),
    }


def with_snapshot(view: View, snapshot: Mapping[str, Any]) -> View:
    """The view with what only the side channel's debug snapshot knows: why a peer is not healthy, its address."""
    workers = (snapshot.get("prefill_workers") or {}).get("workers") or {}
    peers = [dict(peer, **_about(workers.get(peer["peer"]))) for peer in view["peers"]]
    known = {peer["peer"] for peer in peers}
    peers += [
        {"peer": name, "up": bool(worker.get("healthy")), "queued": worker.get("queued_requests", 0), **_about(worker)}
        for name, worker in workers.items()
        if name not in known
    ]
    return {**view, "peers": peers, "role": snapshot.get("role"), "engine": snapshot.get("engine")}


def _about(worker: Mapping[str, Any] | None) -> View:
    return {} if worker is None else {"url": worker.get("url", ""), "problem": worker.get("problem", "")}


def _classes(scrape: Scrape) -> View:
    names = {*scrape.by("disagg_slo_requests_total", "slo_class"), *scrape.by("disagg_slo_burn_rate", "slo_class")}
    return {name: _class(scrape, name) for name in sorted(names)}


def _class(scrape: Scrape, name: str) -> View:
    def per_window(metric: str, refused: str) -> View:
        return scrape.by(metric, "window", slo_class=name, refused=refused)

    quantiles: View = {}
    for labels, value in scrape.samples("disagg_latency_quantile_seconds", slo_class=name):
        quantiles.setdefault(labels["path"], {}).setdefault(labels["what"], {})[labels["q"]] = value
    return {
        "targets_s": scrape.by("disagg_slo_target_seconds", "slo", slo_class=name),
        "attainment": per_window("disagg_slo_attainment_ratio", "excluded"),
        "attainment_with_refused": per_window("disagg_slo_attainment_ratio", "missed"),
        "burn_rate": per_window("disagg_slo_burn_rate", "missed"),
        "outcomes": _counts(scrape.by("disagg_slo_requests_total", "outcome", slo_class=name)),
        "paths": _counts(scrape.by("disagg_slo_requests_total", "path", slo_class=name)),
        "quantiles_s": quantiles,
    }


def _queues(scrape: Scrape) -> View:
    queues: View = {}
    for what, names in QUEUES.items():
        name = next((name for name in names if name in scrape), None)
        if name is not None:
            queues[what] = int(scrape.total(name))
    usages = [value for name in KV_USAGE for _, value in scrape.samples(name)]
    if usages:
        queues["kv_cache_usage"] = max(usages)
    return queues


def _admission(scrape: Scrape) -> list[View]:
    return [
        {**{key: labels[key] for key in ("slo_class", "outcome", "reason")}, "requests": int(value)}
        for labels, value in scrape.samples("disagg_admission_total")
    ]


def _peers(scrape: Scrape) -> list[View]:
    queued = scrape.by("disagg_peer_queued_requests", "peer")
    up = {labels["peer"]: value for labels, value in scrape.samples("disagg_peer_up")}
    return [{"peer": peer, "up": value > 0, "queued": int(queued.get(peer, 0))} for peer, value in sorted(up.items())]


def _transfers(scrape: Scrape) -> View:
    events: View = {}
    for labels, value in scrape.samples("disagg_transfers_total"):
        name = f"{labels['role']} {labels['event']}"
        events[name] = events.get(name, 0) + int(value)
    wire = scrape.by("disagg_transfer_wire_bytes_total", "direction")
    logical = scrape.by("disagg_transfer_logical_bytes_total", "direction")
    return {
        "events": events,
        "open": _counts(scrape.by("disagg_open_transfers", "role")),
        "wire_bytes": _counts(wire),
        "logical_bytes": _counts(logical),
        "compression": {way: round(logical.get(way, 0) / n, 2) for way, n in wire.items() if n},
        "troubles": {
            what: int(scrape.total(name))
            for what, name in (
                ("nacks", "disagg_nacks_total"),
                ("checksum failures", "disagg_checksum_failures_total"),
                ("credit waits", "disagg_credit_waits_total"),
                ("transport errors", "disagg_transport_errors_total"),
                ("side-channel rejects", "disagg_side_channel_rejects_total"),
                ("internal errors", "disagg_internal_errors_total"),
            )
        },
    }


def _cache_hits(scrape: Scrape) -> View:
    """Share of asked tokens that were there."""
    shares: View = {}
    for what, hits, queries in CACHES:
        if (asked := scrape.total(queries)) > 0:
            shares[what] = scrape.total(hits) / asked
    return shares


def _counts(values: Mapping[str, float], convert: Callable[[float], int] = int) -> dict[str, int]:
    return {name: convert(value) for name, value in values.items() if value}
