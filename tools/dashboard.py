"""Write examples/observability/grafana-dashboard.json: the panels stand here as a table, Grafana's JSON around them.

python tools/dashboard.py
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parents[1] / "examples/observability/grafana-dashboard.json"

WHERE = 'model_name=~"$model", instance=~"$instance"'
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """One panel: queries with their legends."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    about: str = ""


def quantiles(metric: str, *by: str) -> tuple[tuple[str, str], ...]:
    """p50 and p99 of a histogram."""
    labels, legend = ", ".join(("le", *by)), " ".join(f"{{{{{label}}}}}" for label in by)
    rates = f"sum by ({labels}) (rate({metric}_bucket{{{WHERE}}}{RATE}))"
    return tuple((f"histogram_quantile({q}, {rates})", f"p{round(q * 100)} {legend}") for q in (0.5, 0.99))


def rate(metric: str, *by: str, more: str = "") -> tuple[tuple[str, str], ...]:
    """A counter's rate, by labels."""
    labels, legend = ", ".join(by), " ".join(f"{{{{{label}}}}}" for label in by)
    return ((f"sum by ({labels}) (rate({metric}{{{WHERE}{more}}}{RATE}))", legend),)


def vllm(name: str) -> str:
    """One of vLLM's own metrics; newer prometheus_client escape the colon when they are asked for OpenMetrics."""
    return f'{{__name__=~"vllm[:_]{name}", {WHERE}}}'


def attained(counted: str) -> str:
    """Share of the counted outcomes that is ``met``; 0 where none is, nothing where there was no request."""
    requests = f"sum by (slo_class) (rate(disagg_slo_requests_total{{{WHERE}{{}}}}{RATE}))"
    met, of = requests.replace("{}", ', outcome="met"'), requests.replace("{}", f', outcome=~"{counted}"')
    return f"({met} or 0 * {of}) / {of}"


OFFERED = f'sum(rate(disagg_transfers_total{{{WHERE}, role="decode", event="offered"}}{RATE}))'
HITS, QUERIES = (f"sum(rate({vllm(f'prefix_cache_{what}_total')}{RATE}))" for what in ("hits", "queries"))
HIT_SHARE = f"{HITS} / {QUERIES}"
LOGICAL, WIRE = (
    f"sum by (direction) (rate(disagg_transfer_{what}_bytes_total{{{WHERE}}}{RATE}))" for what in ("logical", "wire")
)
COMPRESSION = f"{LOGICAL} / {WIRE}"

ROWS: dict[str, tuple[Panel, ...]] = {
    "Does it work": (
        Panel(
            "Active",
            (
                (f"min by (instance) (disagg_active{{{WHERE}}})", "{{instance}}"),
                (f"max by (instance) (disagg_draining{{{WHERE}}})", "{{instance}} drains"),
            ),
            kind="stat",
            width=4,
        ),
        Panel(
            "Why not", ((f"disagg_inactive{{{WHERE}}} == 1", "{{instance}}: {{reason}}"),), kind="table", width=8
        ),
        Panel(
            "Prefill workers by health",
            ((f'sum by (state) (disagg_peers{{{WHERE}, role="prefill"}})', "{{state}}"),),
            width=6,
        ),
        Panel("Worker up", ((f"min by (peer) (disagg_peer_up{{{WHERE}}})", "{{peer}}"),), width=6),
    ),
    "SLOs": (
        Panel("SLO attainment (served)", ((attained("met|missed|error"), "{{slo_class}}"),), "percentunit"),
        Panel(
            "SLO attainment, refused as misses",
            ((attained("met|missed|error|refused"), "{{slo_class}}"),),
            "percentunit",
        ),
        Panel(
            "Burn rate",
            (("disagg:slo_burn:rate5m", "{{slo_class}} 5 min"), ("disagg:slo_burn:rate1h", "{{slo_class}} 1 h")),
            about="1 uses the error budget up exactly; needs the recording rules of alerts.yml.",
        ),
        Panel("TTFT by class", quantiles("disagg_ttft_seconds", "slo_class"), "s"),
        Panel("TTFT by path", quantiles("disagg_ttft_seconds", "path"), "s"),
        Panel("TPOT by class", quantiles("disagg_tpot_seconds", "slo_class"), "s"),
        Panel("Requests by outcome", rate("disagg_slo_requests_total", "slo_class", "outcome"), "reqps"),
        Panel("Requests by path", rate("disagg_slo_requests_total", "path"), "reqps"),
        Panel("Whole requests", quantiles("disagg_e2e_seconds", "slo_class"), "s"),
    ),
    "Admission": (
        Panel("Admission", rate("disagg_admission_total", "slo_class", "outcome", "reason"), "reqps"),
        Panel("Degraded responses", rate("disagg_degradations_total", "slo_class", "step"), "reqps"),
        Panel(
            "Degradation level",
            ((f"max by (slo_class) (disagg_degradation_level{{{WHERE}}})", "{{slo_class}}"),),
        ),
        Panel(
            "Requests in the engine",
            (
                (f"sum({vllm('num_requests_running')})", "running"),
                (f"sum({vllm('num_requests_waiting')})", "waiting"),
            ),
        ),
        Panel("KV cache usage", ((f"max by (instance) ({vllm('kv_cache_usage_perc')})", "{{instance}}"),),
              "percentunit"),
        Panel(
            "Prefix cache hits",
            (
                (HIT_SHARE, "share of asked tokens"),
            ),
            "percentunit",
        ),
    ),
    "Decisions": (
        Panel("Decisions by reason", rate("disagg_decisions_total", "reason"), "reqps"),
        Panel(
            "Measured over predicted TTFT",
            quantiles("disagg_ttft_estimate_ratio", "path"),
            about="1: the prediction was right; above: slower than predicted.",
        ),
        Panel(
            "Error of the latency model",
            ((f"max by (model, worker) (disagg_latency_model_error_ratio{{{WHERE}}})", "{{model}} {{worker}}"),),
            "percentunit",
            about="Mean relative error of its predictions, before each sample was learned.",
        ),
        Panel("Policy errors", rate("disagg_policy_errors_total", "policy", "error"), "ops"),
        Panel("Fallbacks by cause", rate("disagg_fallbacks_total", "cause"), "ops"),
        Panel(
            "Fallback share",
            ((f"sum(rate(disagg_fallbacks_total{{{WHERE}}}{RATE})) / {OFFERED}", "of offloads"),),
            "percentunit",
        ),
        Panel("Offload calls that failed", rate("disagg_offload_failures_total", "reason"), "ops"),
    ),
    "Transfers": (
        Panel("Transfers", rate("disagg_transfers_total", "role", "event"), "ops"),
        Panel("Open transfers", ((f"sum by (role) (disagg_open_transfers{{{WHERE}}})", "{{role}}"),)),
        Panel("Phases of a transfer", quantiles("disagg_transfer_seconds", "phase"), "s"),
        Panel("Bytes on the wire", rate("disagg_transfer_wire_bytes_total", "direction"), "Bps"),
        Panel(
            "Compression",
            (
                (COMPRESSION, "{{direction}}"),
            ),
            about="Bytes that the KV takes in the cache over bytes that travelled.",
        ),
        Panel("Chunk latency", quantiles("disagg_chunk_seconds", "stage"), "s"),
        Panel(
            "Ring slots",
            (
                (f"sum by (state) (disagg_ring_slots{{{WHERE}}})", "ring {{state}}"),
                (f"sum by (state) (disagg_private_buffers{{{WHERE}}})", "private {{state}}"),
            ),
        ),
        Panel(
            "Waits for slots, buffers, blocks",
            (
                (f"sum(rate(disagg_credit_waits_total{{{WHERE}}}{RATE}))", "steps without a free slot at the peer"),
                (f"sum(rate(disagg_buffer_waits_total{{{WHERE}}}{RATE}))", "chunks without a private buffer"),
                (f"sum(rate(disagg_claim_waits_total{{{WHERE}}}{RATE}))", "steps without KV blocks"),
            ),
            "ops",
        ),
        Panel("Tokens held for transfers", ((f"sum by (role) (disagg_held_tokens{{{WHERE}}})", "{{role}}"),)),
        Panel(
            "Prompt tokens not computed, by tier",
            ((f"sum by (tier) (rate(disagg_prefix_tokens_total{{{WHERE}}}{RATE}))", "{{tier}}"),),
        ),
        Panel(
            "LMCache",
            ((f"sum by (event) (rate(disagg_lmcache_events_total{{{WHERE}}}{RATE}))", "{{event}}"),),
            "ops",
        ),
    ),
    "Trouble": (
        Panel(
            "Bad chunks",
            (
                (f"sum by (direction) (rate(disagg_nacks_total{{{WHERE}}}{RATE}))", "NACK {{direction}}"),
                (f"sum(rate(disagg_checksum_failures_total{{{WHERE}}}{RATE}))", "checksum"),
                (f"sum(rate(disagg_chunks_resent_total{{{WHERE}}}{RATE}))", "sent again"),
            ),
            "ops",
        ),
        Panel("Side channel rejects", rate("disagg_side_channel_rejects_total", "reason"), "ops"),
        Panel("Notifications rejected", rate("disagg_notifications_rejected_total", "reason"), "ops"),
        Panel("Links to peers", rate("disagg_peer_events_total", "event"), "ops"),
        Panel(
            "Errors",
            (
                (f"sum(rate(disagg_transport_errors_total{{{WHERE}}}{RATE}))", "transport"),
                (f"sum by (where) (rate(disagg_internal_errors_total{{{WHERE}}}{RATE}))", "internal {{where}}"),
                (f"sum(rate(disagg_transfer_deadlines_total{{{WHERE}}}{RATE}))", "silence"),
                (f"sum(rate(disagg_transfer_failures_total{{{WHERE}}}{RATE}))", "rank could not complete"),
                (f"sum by (cause) (rate(disagg_prefill_drops_total{{{WHERE}}}{RATE}))", "dropped {{cause}}"),
            ),
            "ops",
        ),
        Panel(
            "Age of the figures",
            ((f"time() - max by (instance) (disagg_stats_timestamp_seconds{{{WHERE}}})", "{{instance}}"),),
            "s",
            about="Grows while an engine is idle: it sends figures with its steps.",
        ),
    ),
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """Grafana's model of it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, members in ROWS.items():
        panels.append(_frame(len(panels), row, "row", x=0, y=y, width=24, height=1))
        y, x = y + 1, 0
        for panel in members:
            if x + panel.width > 24:
                x, y = 0, y + 8
            panels.append(_panel(len(panels), panel, x, y))
            x += panel.width
        y += 8
    return {
        "title": "disagg-plugin",
        "uid": "disagg-plugin",
        "description": "Disaggregated prefill and decode: SLOs, decisions, transfers, peers.",
        "tags": ["llm", "disagg"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _variable("model", "model_name"), _variable("instance", "instance")]},
        "panels": panels,
    }


def _frame(number: int, title: str, kind: str, *, x: int, y: int, width: int, height: int) -> dict[str, Any]:
    return {"id": number + 1, "title": title, "type": kind, "gridPos": {"x": x, "y": y, "w": width, "h": height}}


def _panel(number: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    targets = [
        {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend, "datasource": source}
        | ({"format": "table", "instant": True} if panel.kind == "table" else {})
        for i, (expr, legend) in enumerate(panel.queries)
    ]
    return {
        **_frame(number, panel.title, panel.kind, x=x, y=y, width=panel.width, height=8),
        **({"description": panel.about} if panel.about else {}),
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": targets,
    }


def _source() -> dict[str, Any]:
    return {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _variable(name: str, label: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "query": f"label_values(disagg_active, {label})",
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "refresh": 2,
        "current": {"text": "All", "value": "$__all"},
    }


def main() -> None:
    """Write the file."""
    TARGET.write_text(json.dumps(dashboard(), indent=1) + "\n")


if __name__ == "__main__":
    main()
