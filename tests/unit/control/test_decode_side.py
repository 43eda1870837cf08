"""The decode role: what it answers the engine's scheduler, and that each offloaded request ends exactly once."""

from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.control.decode_bench import LONG, PEER, ROOM, Bench

from disagg_plugin.control.decode_port import Claim, NotYet, PrefillLocally, PromptView, Route
from disagg_plugin.control.events import (
    PeerJoined,
    PeerLeft,
    PrefillAccepted,
    PrefillEnded,
    PrefillFailed,
    PrefillStarted,
)
from disagg_plugin.kv.commands import AbandonReceive, OpenReceive, RankReport, RemovePeer


def test_a_short_prompt_stays_local_and_is_decided_once() -> None:
    bench = Bench()
    short = PromptView("s", tuple(range(10)))
    assert bench.match(short) == PrefillLocally("short_prompt")
    assert bench.match(short) == PrefillLocally("short_prompt")
    assert bench.side.decisions["short_prompt"] == 1
    assert not bench.port.offers


def test_a_request_that_must_stay_local_is_never_offered() -> None:
    bench = Bench()
    assert bench.match(replace(LONG, local_only="prompt_logprobs")) == PrefillLocally("prompt_logprobs")
    assert not bench.port.offers


def test_an_accepted_offer_is_claimed_up_to_the_token_before_the_last() -> None:
    bench = Bench()
    assert bench.match(cached=64) == NotYet()
    bench.accepted()
    assert bench.match(cached=64) == Claim(1_000 - 1 - 64)
    assert bench.match(cached=64) == Claim(1_000 - 1 - 64), "the engine asks again after a failed allocation"
    bench.side.allocated("r1", (5, 6), 935)
    assert ("ready", "p:1", "64-999") in bench.port.sent
    (opened,) = bench.side.step()
    assert isinstance(opened, OpenReceive)
    assert (opened.first_token, opened.end_token, opened.block_ids) == (64, 999, (5, 6))


def test_a_queued_prefill_holds_nothing_until_it_starts() -> None:
    bench = Bench()
    bench.match()
    bench.accepted(eta_s=3.0)
    assert bench.match() == NotYet()
    bench.port.events.append(PrefillStarted(bench.transfer_id))
    assert bench.match() == Claim(999)


def test_a_claim_waits_for_room_instead_of_blocking_the_engine() -> None:
    bench = Bench()
    bench.match()
    bench.accepted()
    assert bench.match(free=500) == NotYet()
    assert bench.match(free=1_000) == Claim(999)


def test_transfers_under_way_hold_at_most_their_share_of_the_cache() -> None:
    bench = Bench(capacity_tokens=3_000)
    bench.loading()
    second = PromptView("r2", tuple(range(1_000, 2_000)))
    assert bench.match(second) == NotYet()
    bench.accepted()
    assert bench.match(second) == NotYet(), "999 held + 999 > half of 3,000"
    bench.side.load_completed("r1")
    assert bench.match(second) == Claim(999)


def test_one_transfer_is_let_in_even_if_it_exceeds_the_share() -> None:
    bench = Bench(capacity_tokens=1_100)
    bench.match()
    bench.accepted()
    assert bench.match() == Claim(999)


@pytest.mark.parametrize("reason", ["refused_queue_full", "http_503", "http_unreachable", "offer_timeout"])
def test_a_failed_offer_is_prefilled_locally(reason: str) -> None:
    bench = Bench()
    bench.match()
    bench.port.events.append(PrefillFailed(bench.transfer_id, reason))
    assert bench.match() == PrefillLocally(reason)
    assert bench.side.fallbacks[reason] == 1
    assert len(bench.port.offers) == 1


@pytest.mark.parametrize(
    ("accepted", "patience_s", "reason"),
    [
        pytest.param(False, 3.0, "timeout_offered", id="no answer"),
        pytest.param(True, 70.0, "timeout_accepted", id="never started"),
    ],
)
def test_silence_ends_in_local_prefill(accepted: bool, patience_s: float, reason: str) -> None:
    bench = Bench()
    bench.match()
    if accepted:
        bench.accepted(eta_s=1.0)
        assert bench.match() == NotYet()
    bench.now += patience_s
    assert bench.match() == PrefillLocally(reason)


def test_a_landed_request_is_not_offered_again_after_a_preemption() -> None:
    bench = Bench()
    bench.loading()
    bench.side.load_completed("r1")
    assert bench.side.totals["landed"] == 1
    assert bench.match() == PrefillLocally("already_loaded")


def test_the_end_of_a_prefill_is_recorded_also_after_its_last_chunk() -> None:
    bench = Bench()
    bench.loading()
    bench.side.load_completed("r1")
    bench.now += 0.5
    bench.port.events.append(PrefillEnded(bench.transfer_id))
    bench.side.step()
    bench.side.finished("r1")
    assert bench.side.recent[-1]["prefill_ended_s"] == bench.now


def test_the_journal_hears_where_a_request_went_and_that_it_fell_back() -> None:
    bench = Bench()
    bench.loading()
    assert bench.journal.take_notes()["r1"][0] == "offloaded"
    bench.port.events.append(PrefillFailed(bench.transfer_id, "hold_expired"))
    bench.side.step()
    assert bench.journal.take_notes() == {"r1": ("fallback", None)}
    bench.side.load_completed("r1")
    bench.side.finished("r1")
    ((role, row),) = bench.journal.take_transfers()
    assert (role, row["failure"], row["given_up_s"]) == ("decode", "hold_expired", bench.now)


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(lambda b: b.port.events.append(PeerLeft("p:1", "peer_lost")), id="peer lost"),
        pytest.param(lambda b: b.port.events.append(PrefillFailed(b.transfer_id, "hold_expired")), id="peer gives up"),
        pytest.param(lambda b: b.side.reports([RankReport(0, receive_failed=(("r1", "stalled"),))]), id="a rank fails"),
        pytest.param(lambda b: setattr(b, "now", b.now + 1_000), id="deadline"),
        pytest.param(lambda b: b.side.finished("r1"), id="client aborts"),
    ],
)
def test_trouble_while_loading_is_told_to_the_ranks_once(trouble: object) -> None:
    bench = Bench()
    bench.port.events.append(PeerJoined(PEER))
    bench.loading()
    assert callable(trouble)
    trouble(bench)
    commands = bench.side.step() + bench.side.step()
    assert sum(isinstance(c, AbandonReceive) for c in commands) == 1
    assert bench.side.snapshot()["held_tokens"] == 999, "blocks are held until the ranks have reported"
    bench.side.load_completed("r1")
    bench.side.finished("r1")
    assert bench.side.snapshot()["held_tokens"] == 0
    assert bench.side.snapshot()["tracked_requests"] == 0


def test_peers_are_announced_to_the_ranks_and_removed() -> None:
    bench = Bench()
    bench.port.events += [PeerJoined(PEER), PeerLeft("p:1", "peer_restarted"), PeerJoined(replace(PEER, epoch=2))]
    assert bench.side.step() == [PEER, RemovePeer("p:1"), replace(PEER, epoch=2)]


def test_an_abort_before_anything_was_held_cancels_the_offer() -> None:
    bench = Bench()
    bench.match()
    bench.side.finished("r1")
    assert bench.port.sent == [("cancel", "", "aborted")]
    assert bench.side.snapshot()["tracked_requests"] == 0
    bench.port.events.append(PrefillStarted(bench.transfer_id))
    assert bench.side.step() == []


ACTIONS = st.sampled_from(
    ["match", "accept", "start", "ended", "fail", "lost", "alloc", "step", "rank_fails", "complete", "finish", "wait"]
)


@settings(max_examples=400)
@given(st.lists(ACTIONS, min_size=4, max_size=30))
def test_in_any_order_of_events_nothing_leaks_and_the_ranks_hear_one_end(actions: list[str]) -> None:
    bench = Bench()
    bench.port.events.append(PeerJoined(PEER))
    commands: list[object] = []
    claimed = opened = completed = finished = False
    for action in actions:
        known = bool(bench.port.offers)
        if action == "match" and not finished and not (opened and not completed):
            claimed = isinstance(bench.match(), Claim)
        elif action == "accept" and known:
            bench.accepted(eta_s=1.0)
        elif action == "start" and known:
            bench.port.events += [PrefillAccepted(bench.transfer_id, "p:1", 0.0), PrefillStarted(bench.transfer_id)]
        elif action == "ended" and known:
            bench.port.events.append(PrefillEnded(bench.transfer_id))
        elif action == "fail" and known:
            bench.port.events.append(PrefillFailed(bench.transfer_id, "http_500"))
        elif action == "lost":
            bench.port.events.append(PeerLeft("p:1", "peer_lost"))
        elif action == "alloc" and claimed and not finished:
            bench.side.allocated("r1", (1,), 999)
            opened, claimed = True, False
        elif action == "step":
            commands += bench.side.step()
        elif action == "rank_fails" and opened:
            bench.side.reports([RankReport(0, receive_failed=(("r1", "bad_chunk"),))])
        elif action == "complete" and opened and not completed:
            bench.side.load_completed("r1")
            completed = True
        elif action == "finish" and not finished:
            bench.side.finished("r1")
            finished = True
        elif action == "wait":
            bench.now += 10.0
    if opened and not completed:
        bench.side.load_completed("r1")
    if not finished:
        bench.side.finished("r1")
    commands += bench.side.step()
    assert sum(isinstance(c, OpenReceive) for c in commands) == opened
    assert sum(isinstance(c, AbandonReceive) for c in commands) <= opened
    view = bench.side.snapshot()
    assert (view["held_tokens"], view["tracked_requests"], view["open"]) == (0, 0, [])


# LMCache: a prefix that a store loads beside the transfer


def test_only_what_neither_the_engine_nor_lmcache_holds_is_asked_of_a_worker() -> None:
    bench = Bench()
    ask = partial(bench.side.match, LONG, 64, free_tokens=ROOM, lmcache_tokens=512)
    assert ask() == NotYet()
    assert bench.port.offers[-1].cached_tokens == 512
    bench.accepted()
    assert ask() == Claim(1_000 - 1 - 512)
    bench.side.allocated("r1", (1, 2, 3), 1_000 - 1 - 512)
    assert bench.port.sent[-1] == ("ready", "p:1", "512-999"), "READY says from which token on"


def test_room_is_needed_for_both_loads() -> None:
    bench = Bench()
    bench.match()
    bench.accepted()
    assert bench.side.match(LONG, 0, free_tokens=999, lmcache_tokens=512) == NotYet()
    assert bench.side.match(LONG, 0, free_tokens=1_000, lmcache_tokens=512) == Claim(487)


@pytest.mark.parametrize(("cached", "lmcache"), [(0, 999), (992, 999), (999, 0)])
def test_a_prefix_that_is_held_whole_asks_nobody_whatever_the_policy_says(cached: int, lmcache: int) -> None:
    bench = Bench(split_policy={"prompt_length_threshold": 0})
    answer = bench.side.match(LONG, cached, free_tokens=ROOM, lmcache_tokens=lmcache)
    assert answer == PrefillLocally("prefix_held")
    assert bench.port.offers == []


def test_the_hit_ratio_counts_both() -> None:
    bench = Bench(cache={"min_cache_hit_ratio": 0.6})
    assert bench.side.match(LONG, 64, free_tokens=ROOM, lmcache_tokens=600) == PrefillLocally("cached_enough")


def test_when_the_prefix_is_lost_the_transfer_behind_it_is_given_up_without_blaming_the_worker() -> None:
    bench = Bench()
    bench.loading()
    bench.side.prefix_failed("r1")
    assert bench.side.step() == [AbandonReceive("r1", "prefix_lost")]
    assert [event[0] for event in bench.port.sent].count("failed") == 0
    bench.side.load_completed("r1")
    bench.side.prefix_failed("r1")
    assert bench.match() == PrefillLocally("prefix_lost")


@pytest.mark.parametrize("started", [False, True])
def test_a_worker_that_a_router_chose_is_told_at_once_that_nothing_is_needed_of_it(started: bool) -> None:
    bench = Bench()
    routed = replace(LONG, route=Route("p:1", 7))
    assert bench.side.match(routed, 0, free_tokens=ROOM, lmcache_tokens=999) == NotYet()
    if started:
        bench.accepted()
    answer = bench.side.match(routed, 0, free_tokens=ROOM, lmcache_tokens=999)
    assert answer == PrefillLocally("cached_meanwhile")
    assert bench.port.sent[-1] == ("cancel", "p:1" if started else "", "cached_meanwhile")
    assert not any(event[0] == "ready" for event in bench.port.sent)
