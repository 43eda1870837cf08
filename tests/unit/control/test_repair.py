"""The order of repair: another worker for what has not landed, once; then the engine itself, a few at a time."""

from dataclasses import replace

import pytest
from unit.control.decode_bench import LONG, PEER, Bench

from disagg_plugin.control.decode_port import Claim, NotYet, PrefillLocally, PromptView
from disagg_plugin.control.events import PeerJoined, PeerLeft, PrefillAccepted, PrefillFailed, PrefillStarted
from disagg_plugin.control.fallback_pacer import FallbackPacer
from disagg_plugin.kv.commands import AbandonReceive, OpenReceive, RankReport, SuspendReceive


def with_two_workers(ranks: int = 1, **settings: object) -> Bench:
    bench = Bench(ranks=ranks, **settings)
    (first,) = bench.port.states
    bench.port.states = [first, replace(first, worker="p:2")]
    bench.port.events += [PeerJoined(PEER), PeerJoined(replace(PEER, peer="p:2"))]
    return bench


def take_over(bench: Bench) -> None:
    """The second worker accepts the newest offer and starts at once."""
    bench.port.events.append(PrefillAccepted(bench.transfer_id, "p:2", 0.0))


@pytest.mark.parametrize("reason", ["http_503", "http_connection_lost", "hold_expired"])
def test_what_fails_before_anything_is_held_goes_to_another_worker(reason: str) -> None:
    bench = with_two_workers()
    bench.match()
    first = bench.transfer_id
    bench.accepted(eta_s=5.0)
    bench.port.events.append(PrefillFailed(first, reason))
    assert bench.match() == NotYet()
    assert bench.transfer_id != first, "an id that the first worker knows is worth nothing now"
    assert bench.port.offers[-1].workers == ("p:2",)
    assert ("cancel", "p:1", reason) in bench.port.sent
    take_over(bench)
    assert bench.match() == Claim(999)
    assert (bench.side.fallbacks, bench.side.repairs) == ({}, {reason: 1})


@pytest.mark.parametrize("reason", ["http_400", "prompt_differs"])
def test_a_prompt_that_nobody_would_take_is_not_shown_around(reason: str) -> None:
    bench = with_two_workers()
    bench.match()
    bench.accepted()
    bench.port.events.append(PrefillFailed(bench.transfer_id, reason))
    assert bench.match() == PrefillLocally(reason)
    assert len(bench.port.offers) == 1


def test_the_second_worker_sends_only_what_did_not_land_on_every_rank() -> None:
    bench = with_two_workers(ranks=2)
    bench.loading()
    bench.side.step()
    bench.port.events.append(PeerLeft("p:1", "peer_lost"))
    assert SuspendReceive("r1") in bench.side.step()
    bench.side.reports([RankReport(0, receive_suspended=(("r1", 640),))])
    assert len(bench.port.offers) == 1, "one rank has not said how far it got"
    bench.side.reports([RankReport(1, receive_suspended=(("r1", 512),))])
    assert bench.port.offers[-1].cached_tokens == 512
    take_over(bench)
    (opened,) = [c for c in bench.side.step() if isinstance(c, OpenReceive)]
    assert (opened.peer, opened.first_token, opened.end_token, opened.block_ids) == ("p:2", 512, 999, (1, 2, 3))
    assert opened.transfer_id == bench.transfer_id
    assert ("ready", "p:2", "512-999") in bench.port.sent
    bench.side.load_completed("r1")
    assert (bench.side.totals["landed"], bench.side.totals["repaired"], bench.side.fallbacks) == (1, 1, {})
    bench.side.finished("r1")
    assert bench.side.snapshot()["held_tokens"] == 0


def test_what_a_rank_said_about_the_first_worker_does_not_fail_the_second() -> None:
    bench = with_two_workers(ranks=2)
    bench.loading()
    bench.port.events.append(PeerLeft("p:1", "peer_lost"))
    bench.side.step()
    bench.side.reports([RankReport(0, receive_failed=(("r1", "stalled"),), receive_suspended=(("r1", 0),))])
    bench.side.reports([RankReport(1, receive_failed=(("r1", "stalled"),), receive_suspended=(("r1", 0),))])
    assert len(bench.port.offers) == 2
    assert bench.side.fallbacks == {}


def test_a_transfer_is_repaired_by_another_worker_once() -> None:
    bench = with_two_workers()
    bench.loading()
    for reason in ("stalled", "bad_chunk"):
        bench.side.reports([RankReport(0, receive_failed=(("r1", reason),))])
        commands = bench.side.step()
        bench.side.reports([RankReport(0, receive_suspended=(("r1", 100),))])
        take_over(bench)
        bench.side.step()
    assert commands == [AbandonReceive("r1", "bad_chunk")]
    assert (bench.side.fallbacks, len(bench.port.offers)) == ({"bad_chunk": 1}, 2)


def test_a_rank_that_has_everything_already_is_never_asked_to_go_on() -> None:
    """It reported the request, and would report it again: an assert of the engine."""
    bench = with_two_workers(ranks=2)
    bench.loading()
    bench.side.reports([RankReport(0, received=("r1",))])
    bench.port.events.append(PeerLeft("p:1", "peer_lost"))
    bench.side.step()
    bench.side.reports([RankReport(1, receive_suspended=(("r1", 100),))])
    assert bench.side.step() == [AbandonReceive("r1", "peer_lost")]
    assert len(bench.port.offers) == 1


def test_all_landed_while_its_worker_was_given_up_counts_as_landed() -> None:
    bench = with_two_workers()
    bench.loading()
    bench.port.events.append(PeerLeft("p:1", "peer_lost"))
    bench.side.step()
    bench.side.reports([RankReport(0, received=("r1",))])
    bench.side.load_completed("r1")
    assert (bench.side.totals["landed"], bench.side.fallbacks) == (1, {})


@pytest.mark.parametrize("moment", ["before the ranks stopped", "offered again", "resumed"])
def test_an_abort_during_a_repair_is_told_to_the_ranks_once(moment: str) -> None:
    bench = with_two_workers()
    bench.loading()
    bench.port.events.append(PeerLeft("p:1", "peer_lost"))
    commands = bench.side.step()
    if moment != "before the ranks stopped":
        bench.side.reports([RankReport(0, receive_suspended=(("r1", 100),))])
    if moment == "resumed":
        take_over(bench)
        commands += bench.side.step()
    bench.side.finished("r1")
    commands += bench.side.step() + bench.side.step()
    assert sum(isinstance(c, AbandonReceive) for c in commands) == 1
    bench.side.load_completed("r1")
    assert bench.side.snapshot()["tracked_requests"] == 0


def test_a_second_worker_that_does_not_answer_costs_no_more_than_its_time_out() -> None:
    bench = with_two_workers()
    bench.loading()
    bench.port.events.append(PeerLeft("p:1", "peer_lost"))
    bench.side.step()
    bench.side.reports([RankReport(0, receive_suspended=(("r1", 100),))])
    bench.now += 3.0
    assert bench.side.step() == [AbandonReceive("r1", "timeout_suspended")]


def test_a_policy_that_would_not_offload_the_rest_leaves_it_here() -> None:
    bench = with_two_workers()
    bench.loading()
    bench.port.events.append(PeerLeft("p:1", "peer_lost"))
    bench.side.step()
    bench.side.reports([RankReport(0, receive_suspended=(("r1", 990),))])
    assert bench.side.step() == [AbandonReceive("r1", "peer_lost")], "nine tokens are no reason for a second worker"


def test_a_dead_worker_with_many_transfers_does_not_flood_the_engine() -> None:
    bench = Bench(transfer={"fallback_local_tokens_per_step": 500}, capacity_tokens=100_000)
    bench.port.events.append(PeerJoined(PEER))
    for number in range(8):
        bench.loading(PromptView(f"r{number}", tuple(range(1_000))))
    bench.side.step()
    bench.port.events.append(PeerLeft("p:1", "peer_lost"))
    released = [sum(isinstance(c, AbandonReceive) for c in bench.side.step()) for _ in range(20)]
    assert released[0] == 1, "the first one never waits"
    assert sum(released) == 8
    for steps in range(1, 16):
        assert sum(released[:steps]) * 1_000 <= (steps + 1) * 500 + 1_000
    assert bench.side.fallbacks == {"peer_lost": 8}


def test_a_waiting_fallback_that_is_aborted_is_given_up_at_once() -> None:
    bench = Bench(transfer={"fallback_local_tokens_per_step": 1}, capacity_tokens=100_000)
    for name in ("r1", "r2"):
        bench.loading(replace(LONG, request_id=name))
    bench.port.events += [PrefillFailed(call.transfer_id, "hold_expired") for call in bench.port.offers]
    assert [c.request_id for c in bench.side.step() if isinstance(c, AbandonReceive)] == ["r1"]
    bench.side.finished("r2")
    assert bench.side.step() == [AbandonReceive("r2", "hold_expired")]


def test_waiting_requests_come_back_in_their_turn_as_well() -> None:
    bench = Bench(transfer={"fallback_local_tokens_per_step": 500})
    prompts = [replace(LONG, request_id=name) for name in ("r1", "r2")]
    for prompt in prompts:
        bench.match(prompt)
    bench.port.events += [PrefillFailed(call.transfer_id, "http_503") for call in bench.port.offers]
    answers = []
    for _ in range(4):
        answers.append([type(bench.match(prompt)) for prompt in prompts])
        bench.side.step()
    assert answers[0] == [PrefillLocally, NotYet]
    assert answers[-1] == [PrefillLocally, PrefillLocally]


def test_an_idle_budget_does_not_grow() -> None:
    pacer = FallbackPacer(100)
    for _ in range(50):
        pacer.step()
    for name in "abc":
        pacer.add(name, 80)
    assert list(pacer.released()) == ["a", "b"]
    pacer.step()
    assert list(pacer.released()) == ["c"]


def test_started_by_the_second_worker_only_counts_once_all_ranks_have_stopped() -> None:
    bench = with_two_workers()
    bench.loading()
    bench.port.events.append(PeerLeft("p:1", "peer_lost"))
    bench.side.step()
    bench.side.reports([RankReport(0, receive_suspended=(("r1", 64),))])
    bench.port.events += [PrefillAccepted(bench.transfer_id, "p:2", 9.0), PrefillStarted(bench.transfer_id)]
    (opened,) = [c for c in bench.side.step() if isinstance(c, OpenReceive)]
    assert opened.first_token == 64
