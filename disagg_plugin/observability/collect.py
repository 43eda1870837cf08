"""From a scheduler process's figures and journal to increments for its API server.

Its counters are monotonic, so a difference to the last one says what happened since; nothing is counted
twice, and the roles need not know who watches them. The cost is one snapshot per ``interval_s``, never per token.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from disagg_plugin.observability.buckets import CHUNK_SCATTER, CHUNK_SECONDS, CHUNK_WRITE, pairs_of
from disagg_plugin.observability.deltas import Deltas, series_key
from disagg_plugin.observability.journal import Journal, Row
from disagg_plugin.observability.metrics import SECONDS

View = Mapping[str, Any]

# counters of a rank's data plane (kv/dataplane.py) → metric and labels
RANK_COUNTERS: Mapping[str, tuple[str, ...]] = {
    "chunks_sent": ("disagg_chunks_total", "sent"),
    "chunks_received": ("disagg_chunks_total", "received"),
    "wire_bytes_sent": ("disagg_transfer_wire_bytes_total", "sent"),
    "wire_bytes_received": ("disagg_transfer_wire_bytes_total", "received"),
    "raw_bytes_sent": ("disagg_transfer_logical_bytes_total", "sent"),
    "raw_bytes_received": ("disagg_transfer_logical_bytes_total", "received"),
    "credit_waits": ("disagg_credit_waits_total",),
    "buffer_waits": ("disagg_buffer_waits_total",),
    "nacks": ("disagg_nacks_total", "sent"),
    "nacks_received": ("disagg_nacks_total", "received"),
    "chunks_resent": ("disagg_chunks_resent_total",),
    "checksum_failures": ("disagg_checksum_failures_total",),
    "discards": ("disagg_notifications_rejected_total", "discarded"),
    "replays": ("disagg_notifications_rejected_total", "replay"),
    "foreign": ("disagg_notifications_rejected_total", "foreign"),
    "late": ("disagg_notifications_rejected_total", "late"),
    "bad_slots": ("disagg_notifications_rejected_total", "bad_slot"),
    "unparsable": ("disagg_notifications_rejected_total", "unparsable"),
    "stale_answers": ("disagg_notifications_rejected_total", "stale_answer"),
    "send_deadlines": ("disagg_transfer_deadlines_total", "sent"),
    "receive_deadlines": ("disagg_transfer_deadlines_total", "received"),
    "send_failures": ("disagg_transfer_failures_total", "sent"),
    "receive_failures": ("disagg_transfer_failures_total", "received"),
    "transport_errors": ("disagg_transport_errors_total",),
    "internal_errors": ("disagg_internal_errors_total", "data_thread"),
    "hook_errors": ("disagg_internal_errors_total", "worker_hook"),
    "guard_demotions": ("disagg_guard_demotions_total",),
}
# what the side channel's server counts → metric and labels
CHANNEL_COUNTERS: Mapping[str, tuple[str, ...]] = {
    "rejected_auth": ("disagg_side_channel_rejects_total", "authentication"),
    "impostors": ("disagg_side_channel_rejects_total", "impostor"),
    "handshake_failed": ("disagg_side_channel_rejects_total", "handshake"),
    "malformed": ("disagg_side_channel_rejects_total", "malformed"),
    "oversized": ("disagg_side_channel_rejects_total", "oversized"),
    "dropped": ("disagg_side_channel_rejects_total", "dropped"),
    "messages_in": ("disagg_side_channel_messages_total", "received"),
    "messages_out": ("disagg_side_channel_messages_total", "sent"),
    "callback_errors": ("disagg_internal_errors_total", "side_channel"),
}
# what a prefix store's users count (control/prefix_ledger.py, disagg_lmcache) → metric and labels
PREFIX_COUNTERS: Mapping[str, tuple[str, ...]] = {
    "device_hit_tokens": ("disagg_prefix_tokens_total", "device"),
    "store_hit_tokens": ("disagg_prefix_tokens_total", "lmcache"),
    "wire_tokens": ("disagg_prefix_tokens_total", "wire"),
    "lookups": ("disagg_lmcache_events_total", "lookup"),
    "lookup_timeout": ("disagg_lmcache_events_total", "lookup_timeout"),
    "unused_lookups": ("disagg_lmcache_events_total", "unused"),
    "failed_loads": ("disagg_lmcache_events_total", "failed_load"),
    "load_failed": ("disagg_lmcache_events_total", "withdrawn"),
    "stored_chunks": ("disagg_lmcache_events_total", "stored"),
    "store_refused": ("disagg_lmcache_events_total", "store_refused"),
    "store_failed": ("disagg_lmcache_events_total", "store_failed"),
    "store_dropped": ("disagg_lmcache_events_total", "store_dropped"),
}
# of the totals of both roles, what is not an event in a transfer's life
_BYTES = frozenset({"wire_bytes", "raw_bytes"})
# phases of a transfer: name, from, to; fields of the rows that the roles describe transfers with
PHASES: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "decode": (
        ("accept", "offered_s", "accepted_s"),
        ("start", "accepted_s", "started_s"),
        ("first_chunk", "started_s", "first_chunk_s"),
        ("stream", "first_chunk_s", "last_chunk_s"),
        ("land", "last_chunk_s", "landed_s"),
        ("total", "offered_s", "landed_s"),
    ),
    "prefill": (
        ("queue", "offered_s", "started_s"),
        ("compute", "started_s", "last_computed_s"),
        ("acknowledge", "last_computed_s", "acknowledged_s"),
    ),
}


class Collector:
    """Differences between snapshots; belongs to the scheduler's thread."""

    def __init__(
        self,
        snapshot: Callable[[], View],
        journal: Journal,
        *,
        interval_s: float,
        ring_slots: int = 0,
        private_buffers: int = 0,
        engine_state: Callable[[], dict[str, Any] | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            snapshot: The debug view of the scheduler process.
            ring_slots, private_buffers: What all ranks together have.
            engine_state: What the API server's listeners want to know beside the metrics; asked once an interval.
        """
        self._snapshot = snapshot
        self._journal = journal
        self._interval_s = interval_s
        self._capacity = {"ring": ring_slots, "private": private_buffers}
        self._engine_state = engine_state
        self._clock = clock
        self._wall_clock = wall_clock
        self._due_s = float("-inf")
        self._seen: dict[str, float] = {}
        self._seen_pairs: dict[str, list[float]] = {}
        self._gauges: set[str] = set()  # that were not 0 when last sent

    def collect(self, *, at_rest: bool = False) -> Deltas | None:
        """What is new, or None while nothing is due.

        Args:
            at_rest: The engine has no request left: no further step may come, so the last figures must leave now.
        """
        now_s = self._clock()
        if now_s < self._due_s and not at_rest:
            if not self._journal.has_notes:
                return None
            deltas = Deltas()
            self._take_notes(deltas)  # a note must not come later than the end of its request
            return deltas
        self._due_s = now_s + self._interval_s
        deltas = Deltas()
        self._take_notes(deltas)
        for role, row in self._journal.take_transfers():
            _observe_phases(deltas, role, row)
        self._read(deltas, self._snapshot())
        deltas.set("disagg_stats_timestamp_seconds", to=self._wall_clock())
        self._increase(deltas, self._journal.dropped_notes, "disagg_observations_dropped_total", "notes")
        self._increase(deltas, self._journal.dropped_transfers, "disagg_observations_dropped_total", "transfers")
        if self._engine_state is not None and (state := self._engine_state()) is not None:
            deltas.set_engine_state(state)
        return deltas

    # -- one snapshot ------------------------------------------------------------------------------------------

    def _read(self, deltas: Deltas, view: View) -> None:
        gauges: dict[str, float] = {}
        reason = str(view.get("inactive_reason") or "")
        gauges[series_key("disagg_active")] = 0 if reason else 1
        if reason:
            gauges[series_key("disagg_inactive", reason)] = 1
        if "draining" in view:
            gauges[series_key("disagg_draining")] = bool(view["draining"])
        decode, prefill = view.get("decode") or {}, view.get("prefill") or {}
        self._read_decode(deltas, decode)
        self._read_prefill(deltas, prefill)
        for role, side in (("decode", decode), ("prefill", prefill)):
            if side:
                gauges[series_key("disagg_open_transfers", role)] = side.get("open_transfers", 0)
                gauges[series_key("disagg_held_tokens", role)] = side.get("held_tokens", 0)
        self._read_ranks(deltas, gauges, (decode or prefill).get("ranks") or {})
        self._read_peers(deltas, gauges, view, prefill)
        if (lmcache := view.get("lmcache")) is not None:
            gauges[series_key("disagg_lmcache_active")] = 0 if lmcache["inactive_reason"] else 1
            for name, labelled in PREFIX_COUNTERS.items():
                self._increase(deltas, lmcache["totals"].get(name, 0), *labelled)
        for name, value in (view.get("side_channel") or {}).items():
            if (target := CHANNEL_COUNTERS.get(name)) is not None:
                self._increase(deltas, value, *target)
        for answer, value in (view.get("prefill_service") or {}).items():
            self._increase(deltas, value, "disagg_offers_answered_total", answer)
        for models in (decode.get("model_errors"), (view.get("prefill_workers") or {}).get("model_errors")):
            for model, errors in (models or {}).items():
                gauges |= {series_key("disagg_latency_model_error_ratio", model, name): e for name, e in errors.items()}
        self._send_gauges(deltas, gauges)

    def _read_decode(self, deltas: Deltas, decode: View) -> None:
        for reason, value in (decode.get("decisions") or {}).items():
            self._increase(deltas, value, "disagg_decisions_total", reason)
        for cause, value in (decode.get("fallbacks") or {}).items():
            self._increase(deltas, value, "disagg_fallbacks_total", cause)
        totals = dict(decode.get("totals") or {})
        self._increase(deltas, totals.pop("claim_waits", 0), "disagg_claim_waits_total")
        self._read_totals(deltas, "decode", totals)
        policies = decode.get("policies") or {}
        for policy, failures in (policies.get("failures") or {}).items():
            for error, value in failures.items():
                self._increase(deltas, value, "disagg_policy_errors_total", policy, error)
        self._increase(deltas, policies.get("builtin_errors", 0), "disagg_policy_errors_total", "builtin", "raised")

    def _read_prefill(self, deltas: Deltas, prefill: View) -> None:
        for cause, value in (prefill.get("drops") or {}).items():
            self._increase(deltas, value, "disagg_prefill_drops_total", cause)
        self._read_totals(deltas, "prefill", prefill.get("totals") or {})

    def _read_totals(self, deltas: Deltas, role: str, totals: View) -> None:
        for event, value in totals.items():
            if event not in _BYTES:
                self._increase(deltas, value, "disagg_transfers_total", role, event)

    def _read_ranks(self, deltas: Deltas, gauges: dict[str, float], ranks: Mapping[str, View]) -> None:
        used = {"slots_in_use": 0.0, "slots_quarantined": 0.0, "private_buffers_in_use": 0.0}
        for rank, counters in ranks.items():
            for name, target in RANK_COUNTERS.items():
                self._increase(deltas, counters.get(name, 0), *target, source=f"rank {rank} {name}")
            for prefix, stage in ((CHUNK_WRITE, "write"), (CHUNK_SCATTER, "scatter")):
                self._increase_histogram(deltas, rank, prefix, stage, counters)
            for name in used:
                used[name] += counters.get(name, 0)
        if ranks:
            gauges[series_key("disagg_ring_slots", "in_use")] = used["slots_in_use"]
            gauges[series_key("disagg_ring_slots", "quarantined")] = used["slots_quarantined"]
            gauges[series_key("disagg_private_buffers", "in_use")] = used["private_buffers_in_use"]
            gauges[series_key("disagg_ring_slots", "capacity")] = self._capacity["ring"]
            gauges[series_key("disagg_private_buffers", "capacity")] = self._capacity["private"]

    def _read_peers(self, deltas: Deltas, gauges: dict[str, float], view: View, prefill: View) -> None:
        links = view.get("prefill_workers") or {}
        for name, value in (links.get("counters") or {}).items():
            if name.startswith("failed_"):
                self._increase(deltas, value, "disagg_offload_failures_total", name.removeprefix("failed_"))
            else:
                self._increase(deltas, value, "disagg_peer_events_total", name)
        states = {"healthy": 0}  # said also when nobody is
        workers = links.get("workers") or {}
        for peer, worker in workers.items():
            state = str(worker.get("state") or ("healthy" if worker.get("healthy") else "gone"))
            states[state] = states.get(state, 0) + 1
            gauges[series_key("disagg_peer_up", peer)] = bool(worker.get("healthy"))
            gauges[series_key("disagg_peer_queued_requests", peer)] = worker.get("queued_requests", 0)
        if "prefill_workers" in view:
            gauges |= {series_key("disagg_peers", "prefill", state): n for state, n in states.items()}
        if prefill:
            gauges[series_key("disagg_peers", "decode", "healthy")] = len(prefill.get("peers") or ())

    # -- inside ------------------------------------------------------------------------------------------------

    def _take_notes(self, deltas: Deltas) -> None:
        for request_id, (path, estimated_s) in self._journal.take_notes().items():
            deltas.note(request_id, path, estimated_s)

    def _increase(self, deltas: Deltas, value: float, name: str, *labels: str, source: str = "") -> None:
        """``value`` is a monotonic counter; ``source`` tells apart what adds up to one series."""
        key = source or series_key(name, *labels)
        before = self._seen.get(key, 0)
        if value != before:
            self._seen[key] = value
            deltas.count(name, *labels, by=value - before if value > before else value)  # less: it started anew

    def _increase_histogram(self, deltas: Deltas, rank: str, prefix: str, stage: str, counters: View) -> None:
        pairs = pairs_of(counters, prefix, CHUNK_SECONDS)
        before = self._seen_pairs.get(source := f"rank {rank} {prefix}", [0.0] * len(pairs))
        if pairs == before:
            return
        restarted = any(now < then for now, then in zip(pairs, before, strict=True))
        new = pairs if restarted else [now - then for now, then in zip(pairs, before, strict=True)]
        self._seen_pairs[source] = pairs
        mine = Deltas({"histograms": {series_key("disagg_chunk_seconds", stage): new}})
        deltas.merge(mine)

    def _send_gauges(self, deltas: Deltas, gauges: dict[str, float]) -> None:
        """All gauges; those that are gone go to 0 once."""
        for key in self._gauges - gauges.keys():
            deltas.gauges[key] = 0
        deltas.gauges.update({key: float(value) for key, value in gauges.items()})
        self._gauges = {key for key, value in gauges.items() if value}


def _observe_phases(deltas: Deltas, role: str, row: Row) -> None:
    for phase, first, last in PHASES[role]:
        start_s, end_s = row.get(first), row.get(last)
        if isinstance(start_s, float) and isinstance(end_s, float) and 0 < start_s <= end_s:
            name = phase if role == "decode" else f"prefill_{phase}"
            deltas.observe("disagg_transfer_seconds", name, value=end_s - start_s, buckets=SECONDS)
