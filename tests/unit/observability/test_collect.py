"""From snapshots to increments: every event once, whenever somebody looks."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugin.observability.collect import Collector
from disagg_plugin.observability.deltas import Deltas, series_key
from disagg_plugin.observability.journal import MAX_TRANSFERS, Journal

KEY = series_key


class Scheduler:
    """A scheduler process reduced to its snapshot, with a hand-driven clock."""

    def __init__(self, **view: Any) -> None:
        self.view: dict[str, Any] = {"inactive_reason": "", **view}
        self.now_s = 100.0
        self.snapshots = 0
        self.journal = Journal()
        self.state: dict[str, Any] | None = None
        self.collector = Collector(
            self.snapshot,
            self.journal,
            interval_s=0.1,
            ring_slots=16,
            private_buffers=8,
            engine_state=lambda: self.state,
            clock=lambda: self.now_s,
            wall_clock=lambda: 1_700_000_000.0,
        )

    def snapshot(self) -> dict[str, Any]:
        self.snapshots += 1
        return self.view

    def later(self) -> Deltas:
        self.now_s += 1.0
        deltas = self.collector.collect()
        assert deltas is not None
        return deltas


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_increments_add_up_to_the_counter(steps: list[int]):
    scheduler = Scheduler(decode={"decisions": {"short_prompt": 0}})
    sent = 0.0
    for step in steps:
        scheduler.view["decode"]["decisions"]["short_prompt"] += step
        sent += scheduler.later().counters.get(KEY("disagg_decisions_total", "short_prompt"), 0)
    assert sent == sum(steps)


def test_a_counter_that_starts_anew_counts_from_zero():
    scheduler = Scheduler(decode={"fallbacks": {"peer_lost": 5}})
    scheduler.later()
    scheduler.view["decode"]["fallbacks"]["peer_lost"] = 2
    assert scheduler.later().counters[KEY("disagg_fallbacks_total", "peer_lost")] == 2


def test_within_the_interval_nothing_is_asked_and_nothing_sent():
    scheduler = Scheduler()
    scheduler.later()
    scheduler.now_s += 0.05
    assert scheduler.collector.collect() is None
    assert scheduler.snapshots == 1


def test_a_note_leaves_at_once_alone():
    scheduler = Scheduler()
    scheduler.later()
    scheduler.journal.decided("r1", "offloaded", 0.4)
    deltas = scheduler.collector.collect()
    assert deltas is not None
    assert list(deltas.notes()) == [("r1", ["offloaded", 0.4])]
    assert (scheduler.snapshots, deltas.gauges) == (1, {})
    assert scheduler.collector.collect() is None


def test_an_engine_that_comes_to_rest_says_its_last_figures_at_once():
    scheduler = Scheduler(decode={"open_transfers": 1, "held_tokens": 100})
    scheduler.later()
    scheduler.view["decode"] = {"open_transfers": 0, "held_tokens": 0}
    deltas = scheduler.collector.collect(at_rest=True)
    assert deltas is not None
    assert deltas.gauges[KEY("disagg_open_transfers", "decode")] == 0


def test_ranks_add_up():
    ranks = {"0": {"nacks": 1, "slots_in_use": 2}, "1": {"nacks": 3, "slots_in_use": 1}}
    deltas = Scheduler(decode={"ranks": ranks}).later()
    assert deltas.counters[KEY("disagg_nacks_total", "sent")] == 4
    assert deltas.gauges[KEY("disagg_ring_slots", "in_use")] == 3
    assert deltas.gauges[KEY("disagg_ring_slots", "capacity")] == 16


def test_an_engine_of_both_roles_counts_its_ranks_once():
    ranks = {"0": {"chunks_sent": 7}}
    deltas = Scheduler(decode={"ranks": ranks}, prefill={"ranks": ranks}).later()
    assert deltas.counters[KEY("disagg_chunks_total", "sent")] == 7


def test_chunk_durations_come_out_as_a_histogram_of_what_is_new():
    counters = {"chunk_write_s/n/3": 2.0, "chunk_write_s/s/3": 0.008}
    scheduler = Scheduler(prefill={"ranks": {"0": counters}})
    name = KEY("disagg_chunk_seconds", "write")
    assert scheduler.later().histograms[name][6:8] == [2.0, 0.008]
    assert name not in scheduler.later().histograms
    scheduler.view["prefill"]["ranks"] = {"0": {"chunk_write_s/n/3": 3.0, "chunk_write_s/s/3": 0.011}}
    assert scheduler.later().histograms[name][6:8] == [1.0, pytest.approx(0.003)]


def test_why_the_plugin_is_inactive_is_a_label():
    scheduler = Scheduler(inactive_reason="attention is limited to a window of 512 tokens")
    gauges = scheduler.later().gauges
    assert gauges["disagg_active"] == 0
    assert gauges[KEY("disagg_inactive", "attention is limited to a window of 512 tokens")] == 1
    scheduler.view["inactive_reason"] = ""
    gauges = scheduler.later().gauges
    assert gauges["disagg_active"] == 1
    assert gauges[KEY("disagg_inactive", "attention is limited to a window of 512 tokens")] == 0


def test_whether_an_engine_drains_is_said_by_those_that_can():
    scheduler = Scheduler(draining=True)
    assert scheduler.later().gauges[KEY("disagg_draining")] == 1
    scheduler.view["draining"] = False
    assert scheduler.later().gauges[KEY("disagg_draining")] == 0
    assert KEY("disagg_draining") not in Scheduler().later().gauges


def test_peers_by_health_and_the_failures_of_their_links():
    workers = {
        "a": {"healthy": True, "state": "healthy", "queued_requests": 3},
        "b": {"healthy": False, "state": "connecting"},
        "c": {"healthy": False, "state": "suspect"},
    }
    counters = {"failed_offer_timeout": 2, "peer_silent": 1}
    deltas = Scheduler(prefill_workers={"counters": counters, "workers": workers}).later()
    states = {s: deltas.gauges[KEY("disagg_peers", "prefill", s)] for s in ("healthy", "suspect", "connecting")}
    assert states == {"healthy": 1, "suspect": 1, "connecting": 1}
    assert [deltas.gauges[KEY("disagg_peer_up", peer)] for peer in "abc"] == [1, 0, 0]
    assert deltas.counters[KEY("disagg_offload_failures_total", "offer_timeout")] == 2
    assert deltas.counters[KEY("disagg_peer_events_total", "peer_silent")] == 1


def test_the_latency_models_errors_are_those_of_both_threads():
    here = {"prefill": {"here": 0.25}, "decode": {"here": 0.5}}
    there = {"transfer": {"p:1": 0.75}}
    gauges = Scheduler(decode={"model_errors": here}, prefill_workers={"model_errors": there}).later().gauges
    found = {
        key: gauges[KEY("disagg_latency_model_error_ratio", *key)] for key in (("prefill", "here"), ("decode", "here"))
    }
    assert found == {("prefill", "here"): 0.25, ("decode", "here"): 0.5}
    assert gauges[KEY("disagg_latency_model_error_ratio", "transfer", "p:1")] == 0.75


def test_failures_of_policies_carry_policy_and_error():
    policies = {"failures": {"offload mine": {"late": 2, "raised": 1}}, "builtin_errors": 1}
    counters = Scheduler(decode={"policies": policies}).later().counters
    assert counters[KEY("disagg_policy_errors_total", "offload mine", "late")] == 2
    assert counters[KEY("disagg_policy_errors_total", "builtin", "raised")] == 1


def test_a_landed_transfer_gives_its_phases_and_an_unfinished_one_only_those_it_reached():
    scheduler = Scheduler()
    landed = {"offered_s": 10.0, "accepted_s": 10.1, "started_s": 10.2, "first_chunk_s": 10.5, "last_chunk_s": 10.9}
    scheduler.journal.transfer_over("decode", {**landed, "landed_s": 11.0})
    scheduler.journal.transfer_over("decode", {"offered_s": 10.0, "accepted_s": 10.1, "landed_s": 0.0})
    histograms = scheduler.later().histograms
    counts = {key.partition("\x1f")[2]: sum(pairs[::2]) for key, pairs in histograms.items()}
    assert counts == {"accept": 2, "start": 1, "first_chunk": 1, "stream": 1, "land": 1, "total": 1}


def test_too_many_transfers_between_two_looks_are_counted_not_kept():
    scheduler = Scheduler()
    for _ in range(MAX_TRANSFERS + 5):
        scheduler.journal.transfer_over("prefill", {})
    assert scheduler.later().counters[KEY("disagg_observations_dropped_total", "transfers")] == 5


def test_the_engines_state_goes_along():
    scheduler = Scheduler()
    scheduler.state = {"queued_prefill_tokens": 4_000}
    assert scheduler.later().engine_state == {"queued_prefill_tokens": 4_000}


def test_prefix_tokens_are_counted_by_tier_and_a_prefix_store_that_is_not_used_shows():
    totals = {
        "device_hit_tokens": 96,
        "store_hit_tokens": 256,
        "wire_tokens": 543,
        "lookups": 1,
        "failed_load_tokens": 9,
    }
    deltas = Scheduler(lmcache={"inactive_reason": "gone", "totals": totals}).later()
    by_tier = [deltas.counters[KEY("disagg_prefix_tokens_total", tier)] for tier in ("device", "lmcache", "wire")]
    assert by_tier == [96, 256, 543]
    assert deltas.counters[KEY("disagg_lmcache_events_total", "lookup")] == 1
    assert deltas.gauges[KEY("disagg_lmcache_active")] == 0
