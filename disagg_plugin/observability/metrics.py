"""Every metric of the plugin in one table, and what makes Prometheus instruments of it.

Names follow Prometheus' conventions: ``disagg_``, base units, ``_total`` for counters. All carry ``model_name``;
those of the scheduler process carry ``engine`` (the DP rank) too. docs/metrics.md is made from this table
(``python tools/metrics_table.py``).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from disagg_plugin.observability.buckets import CHUNK_SECONDS
from disagg_plugin.observability.deltas import Deltas, split_key

Kind = Literal["counter", "gauge", "histogram"]
Scope = Literal["engine", "frontend"]

MAX_SERIES = 256  # of one metric; what comes beyond counts under the label value "other"
OTHER = "other"

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TPOT_SECONDS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 2.0)
TTFT_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
E2E_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0)
RATIOS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        labels: Its own labels, beside those of its scope.
        exclusive: A gauge of which one series per ``model_name`` and ``engine`` is current: the one before goes to 0.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    scope: Scope = "engine"
    buckets: tuple[float, ...] = ()
    exclusive: bool = False

    @property
    def base_labels(self) -> tuple[str, ...]:
        return ("model_name", "engine") if self.scope == "engine" else ("model_name",)


def _count(name: str, help_: str, *labels: str, scope: Scope = "engine") -> Metric:
    return Metric(name, "counter", help_, labels, scope)


def _gauge(name: str, help_: str, *labels: str, scope: Scope = "engine", exclusive: bool = False) -> Metric:
    return Metric(name, "gauge", help_, labels, scope, exclusive=exclusive)


def _times(
    name: str, help_: str, *labels: str, scope: Scope = "engine", buckets: tuple[float, ...] = SECONDS
) -> Metric:
    return Metric(name, "histogram", help_, labels, scope, buckets)


_TABLE: tuple[Metric, ...] = (
    # whether it works at all
    _gauge("disagg_active", "1 while the plugin takes part; 0: every prompt is prefilled where it arrived."),
    _gauge("disagg_inactive", "1 for the reason why the plugin takes no part.", "reason", exclusive=True),
    _gauge("disagg_draining", "1 while this prefill engine takes no more prompts for others, because it is to leave."),
    _gauge("disagg_stats_timestamp_seconds", "Unix time at which the engine last sent figures; it sends none idle."),
    # decisions
    _count("disagg_decisions_total", "Decisions on where a prompt is prefilled, by reason.", "reason"),
    _gauge(
        "disagg_latency_model_error_ratio",
        "Mean relative error of what the latency model predicted, before it learned the sample.",
        "model",
        "worker",
    ),
    _count("disagg_policy_errors_total", "Failures of policies: late, raised, nonsense.", "policy", "error"),
    _count("disagg_fallbacks_total", "Offloads that failed and were repaired by local prefill.", "cause"),
    _times(
        "disagg_ttft_estimated_seconds",
        "TTFT that the decision predicted for the path it chose.",
        "path",
        scope="frontend",
        buckets=TTFT_SECONDS,
    ),
    _times(
        "disagg_ttft_estimate_ratio",
        "Measured TTFT over the predicted one; above 1: slower than predicted.",
        "path",
        scope="frontend",
        buckets=RATIOS,
    ),
    # transfers
    _count("disagg_transfers_total", "Transfers by what happened to them.", "role", "event"),
    _count("disagg_claim_waits_total", "Engine steps in which an offload waited for KV blocks on the decode engine."),
    _count("disagg_prefill_drops_total", "Transfers given up by the prefill engine.", "cause"),
    _gauge("disagg_open_transfers", "Transfers under way.", "role"),
    _gauge("disagg_held_tokens", "Tokens whose KV blocks are held for transfers.", "role"),
    _times("disagg_transfer_seconds", "How long the phases of a transfer took.", "phase"),
    _count("disagg_transfer_wire_bytes_total", "Bytes of KV that travelled, after the codec.", "direction"),
    _count("disagg_transfer_logical_bytes_total", "Bytes that the same KV takes in the cache.", "direction"),
    # prefixes
    _count("disagg_prefix_tokens_total", "Prompt tokens not computed here, by where their KV came from.", "tier"),
    _gauge("disagg_lmcache_active", "1 while LMCache is asked for prefixes; 0: configured, and not used."),
    _count("disagg_lmcache_events_total", "Look-ups in LMCache, chunks stored there, and what went wrong.", "event"),
    # chunks, slots, credits
    _count("disagg_chunks_total", "KV chunks.", "direction"),
    _times(
        "disagg_chunk_seconds",
        "write: from the post of a chunk to its acknowledgement; scatter: from its arrival to the KV cache.",
        "stage",
        buckets=CHUNK_SECONDS,
    ),
    _gauge("disagg_ring_slots", "Slots of all ranks: in use for sending, quarantined, and there are.", "state"),
    _gauge("disagg_private_buffers", "Buffers for landed chunks, all ranks: in use, and there are.", "state"),
    _count("disagg_credit_waits_total", "Engine steps in which a computed chunk found no free slot at the peer."),
    _count("disagg_buffer_waits_total", "Landed chunks that waited for a private buffer."),
    _count("disagg_nacks_total", "Chunks reported bad or missing.", "direction"),
    _count("disagg_chunks_resent_total", "Chunks written a second time."),
    _count("disagg_checksum_failures_total", "Landed chunks whose header or checksum was wrong."),
    _count("disagg_notifications_rejected_total", "Data-plane notifications that were not acted upon.", "reason"),
    _count("disagg_transfer_deadlines_total", "Transfers broken by silence.", "direction"),
    _count("disagg_transfer_failures_total", "Transfers that one rank could not complete.", "direction"),
    _count("disagg_transport_errors_total", "Errors of the transport (NIXL)."),
    _count("disagg_internal_errors_total", "Errors of the plugin that were caught at a boundary.", "where"),
    _count("disagg_guard_demotions_total", "Layers that stepped down from int8 for too much quantization noise."),
    # peers and the side channel
    _gauge("disagg_peers", "Known peers: prefill workers by health, and connected decode engines.", "role", "state"),
    _gauge("disagg_peer_up", "1: healthy and usable; 0: suspect, gone or refused.", "peer"),
    _gauge("disagg_peer_queued_requests", "Queued requests, as the prefill worker last reported.", "peer"),
    _count("disagg_peer_events_total", "What happened on links to peers.", "event"),
    _count("disagg_offload_failures_total", "Offload calls that brought no prefill, by reason.", "reason"),
    _count("disagg_offers_answered_total", "Offers that this prefill engine answered.", "answer"),
    _count("disagg_side_channel_rejects_total", "Connections and messages that the side channel refused.", "reason"),
    _count("disagg_side_channel_messages_total", "Messages of the side channel.", "direction"),
    # requests and SLOs, measured in the API server
    _times("disagg_ttft_seconds", "Time to first token.", "slo_class", "path", scope="frontend", buckets=TTFT_SECONDS),
    _times(
        "disagg_tpot_seconds",
        "Mean time per output token after the first, one value a request.",
        *("slo_class", "path"),
        scope="frontend",
        buckets=TPOT_SECONDS,
    ),
    _times("disagg_e2e_seconds", "Whole request.", "slo_class", "path", scope="frontend", buckets=E2E_SECONDS),
    _count(
        "disagg_slo_requests_total",
        "Requests by outcome: met, missed (all SLOs of the class together), error, refused, aborted (by the client).",
        *("slo_class", "path", "outcome"),
        scope="frontend",
    ),
    _count(
        "disagg_slo_missed_total", "SLOs that were missed; a request may miss several.", "slo_class", "path", "slo",
        scope="frontend",
    ),
    _gauge("disagg_slo_target_seconds", "What the class promises.", "slo_class", "slo", scope="frontend"),
    _gauge("disagg_slo_objective_ratio", "Share of requests meant to meet their SLOs.", scope="frontend"),
    _gauge(
        "disagg_slo_attainment_ratio",
        "Share of requests that met their SLOs; refused: left out, or counted as misses. NaN: there was none.",
        *("slo_class", "window", "refused"),
        scope="frontend",
    ),
    _gauge(
        "disagg_slo_burn_rate",
        "Share of misses over the share that the objective allows.",
        *("slo_class", "window", "refused"),
        scope="frontend",
    ),
    _gauge(
        "disagg_latency_quantile_seconds",
        "Quantiles of the last 5 minutes of one API server (t-digest).",
        *("slo_class", "path", "what", "q"),
        scope="frontend",
    ),
    # admission
    _count(
        "disagg_admission_total", "Admission outcomes.", "slo_class", "outcome", "reason", scope="frontend"
    ),
    _count("disagg_degradations_total", "Responses degraded, by step.", "slo_class", "step", scope="frontend"),
    _gauge("disagg_degradation_level", "Steps of degradation in force.", "slo_class", scope="frontend"),
    # about these figures themselves
    _count("disagg_observations_dropped_total", "Observations left out to keep memory bounded.", "what"),
)  # fmt: skip

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _TABLE}


class Series(Protocol):
    """One labelled series of ``prometheus_client``, or of an engine's stand-in for it."""

    def inc(self, amount: float = 1) -> Any: ...
    def set(self, value: float) -> Any: ...
    def observe(self, amount: float) -> Any: ...


class Instrument(Protocol):
    """A metric of ``prometheus_client``, or of an engine's stand-in for it."""

    def labels(self, *values: Any) -> Any: ...


def make_instrument(metric: Metric, classes: Mapping[Kind, Callable[..., Instrument]], **options: Any) -> Instrument:
    """The metric as an instrument of the given classes; ``options`` go to each (``registry``)."""
    labels = [*metric.base_labels, *metric.labels]
    if metric.kind == "histogram":
        options["buckets"] = list(metric.buckets)
    elif metric.kind == "gauge":
        options["multiprocess_mode"] = "mostrecent"  # several API servers: the figures of whoever heard last
    return classes[metric.kind](metric.name, metric.help, labels, **options)


class MetricSet:
    """The instruments of one process, and the series that were used."""

    def __init__(self, make: Callable[[Metric], Instrument], metrics: Iterable[Metric] = METRICS.values()) -> None:
        self._instruments = {metric.name: make(metric) for metric in metrics}
        self._series: dict[tuple[str, tuple[str, ...]], Series] = {}
        self._sizes = dict.fromkeys(self._instruments, 0)
        self._current: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {}  # of exclusive gauges

    def count(self, name: str, base: Sequence[str], *labels: str, by: float = 1) -> None:
        self._find(name, base, labels).inc(by)

    def set(self, name: str, base: Sequence[str], *labels: str, to: float) -> None:
        if METRICS[name].exclusive:
            before = self._current.get((name, tuple(base)), labels)
            if before != labels:
                self._find(name, base, before).set(0)
            self._current[name, tuple(base)] = labels
        self._find(name, base, labels).set(to)

    def observe(self, name: str, base: Sequence[str], *labels: str, value: float, times: int = 1) -> None:
        series = self._find(name, base, labels)
        for _ in range(times):
            series.observe(value)

    def apply(self, deltas: Deltas, base: Sequence[str]) -> None:
        """Add what one engine sent; names of another version of the plugin are left out."""
        for key, by in deltas.counters.items():
            name, labels = split_key(key)
            if self._knows(name, labels, "counter") and by > 0:
                self.count(name, base, *labels, by=by)
        for key, value in deltas.gauges.items():
            name, labels = split_key(key)
            if self._knows(name, labels, "gauge"):
                self.set(name, base, *labels, to=value)
        for key, pairs in deltas.histograms.items():
            name, labels = split_key(key)
            if self._knows(name, labels, "histogram"):
                for times, total in zip(pairs[::2], pairs[1::2], strict=True):
                    if times >= 1:  # a bucket's mean lies in the bucket: count and sum come out as they were
                        self.observe(name, base, *labels, value=total / times, times=int(times))

    def _knows(self, name: str, labels: tuple[str, ...], kind: Kind) -> bool:
        metric = METRICS.get(name)
        return metric is not None and metric.kind == kind and len(labels) == len(metric.labels)

    def _find(self, name: str, base: Sequence[str], labels: tuple[str, ...]) -> Series:
        series = self._series.get((name, key := (*base, *labels)))
        if series is None:
            if self._sizes[name] >= MAX_SERIES and any(label != OTHER for label in labels):
                return self._find(name, base, (OTHER,) * len(labels))
            self._sizes[name] += 1
            made: Series = self._instruments[name].labels(*key)
            series = self._series[name, key] = made
        return series
