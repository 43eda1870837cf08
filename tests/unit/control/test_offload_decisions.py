"""What the policies are told, and what is learned from what became of their answers."""

from dataclasses import replace

import pytest
from unit.control.decode_bench import LONG, PEER, Bench

from disagg_plugin.control.decode_port import Claim, NotYet, PrefillLocally, PromptView
from disagg_plugin.control.events import PeerJoined, PeerLeft, PrefillFailed
from disagg_plugin.control.step_times import StepWork
from disagg_plugin.kv.commands import RankReport, ReceiveTiming
from disagg_plugin.serving.latency import HERE
from disagg_plugin.serving.prefix_hash import prefix_hashes
from disagg_policies.snapshots import PrefillModel


def of_length(name: str, tokens: int) -> PromptView:
    return PromptView(name, tuple(range(tokens)))


def test_the_settings_reach_the_policies() -> None:
    bench = Bench(split_policy={"prompt_length_threshold": 600}, cache={"min_cache_hit_ratio": 0.25})
    assert bench.match(of_length("a", 600)) == PrefillLocally("short_prompt")
    assert bench.match(of_length("b", 601)) == NotYet()
    assert bench.match(of_length("c", 1_000), cached=250) == PrefillLocally("cached_enough")
    assert bench.match(of_length("d", 1_000), cached=249) == NotYet()


def test_the_hashes_are_of_this_salt_and_this_adapter() -> None:
    bench = Bench()
    bench.match(PromptView("a", LONG.token_ids, cache_salt="s", lora="l"))
    assert bench.port.hashes == [prefix_hashes(LONG.token_ids, salt="s", lora="l")]


def test_prompts_that_stay_are_the_engines_own_queue() -> None:
    bench = Bench()
    bench.match(of_length("stays", 200))
    bench.match(of_length("stays", 200))
    bench.match(LONG)
    assert (bench.load.load().queued_requests, bench.load.load().queued_prefill_tokens) == (1, 200)
    bench.port.events.append(PrefillFailed(bench.transfer_id, "http_500"))
    assert bench.match(LONG, cached=64) == PrefillLocally("http_500")
    assert (bench.load.load().queued_requests, bench.load.load().queued_prefill_tokens) == (2, 1_136)
    bench.side.finished("stays")
    bench.side.finished("r1")
    assert bench.load.load().queued_prefill_tokens == 0


def test_what_a_broken_transfer_leaves_to_compute_is_counted_as_local_work() -> None:
    bench = Bench()
    bench.port.events.append(PeerJoined(PEER))
    bench.loading()
    bench.port.events.append(PeerLeft("p:1", "peer_lost"))
    bench.side.step()
    assert bench.load.load().queued_prefill_tokens == 1_000


def test_running_decodes_are_those_of_the_last_step_that_have_not_ended() -> None:
    bench = Bench()
    bench.load.step_built(1, StepWork(decodes=4, decode_context_tokens=4_000))
    assert (bench.load.load().running_decodes, bench.load.load().decode_context_tokens) == (4, 4_000)
    bench.side.finished("one")
    assert (bench.load.load().running_decodes, bench.load.load().decode_context_tokens) == (3, 3_000)
    for name in ("two", "three", "four", "five"):
        bench.side.finished(name)
    assert bench.load.load().running_decodes == 0


def test_kv_that_is_promised_counts_before_it_is_held() -> None:
    bench = Bench(capacity_tokens=4_000, policy={"offload": "latency"})
    bench.load.step_built(1, StepWork(decodes=50, decode_context_tokens=50))  # a local prefill would stall many
    assert bench.match() == NotYet()
    assert bench.match(of_length("r2", 1_500)) == PrefillLocally("kv_budget"), "999 promised + 1,500 > 2,000"
    bench.side.finished("r1")
    assert bench.match(of_length("r3", 1_500)) == NotYet()


def test_a_landed_transfer_teaches_bytes_per_token_and_the_overhead() -> None:
    bench = Bench()
    offered_s = bench.now
    bench.loading()
    timing = ReceiveTiming("r1", offered_s + 1.0, offered_s + 1.6, 4, 4_000, 4_000, ("raw",))
    bench.side.reports([RankReport(0, receive_timings=(timing,))])
    bench.now += 9.0
    bench.side.load_completed("r1")
    assert ("landed", "p:1", "4000 of 999") in bench.port.sent
    (overhead,) = [text for what, _, text in bench.port.sent if what == "saw_overhead"]
    assert 7.0 < float(overhead) < 9.0, "nine seconds, less about one that the prior expects of a prefill"


def test_an_engine_that_never_prefilled_takes_itself_to_be_as_fast_as_its_workers() -> None:
    bench = Bench(policy={"offload": "latency"})
    fast = PrefillModel(base_s=0.001, per_token_s=1e-6, per_pair_s=1e-12, samples=9)
    bench.port.states = [replace(bench.port.states[0], prefill=fast)]
    bench.match()
    (row,) = bench.side.snapshot()["decision_log"]  # type: ignore[misc]
    assert row["local_ttft_s"] < 0.01, "not the 1,000 tokens/s of the prior"
    assert bench.port.assumed == replace(fast, samples=0), "and so of a worker that has just restarted"


def test_what_this_engine_measured_of_itself_is_what_it_assumes_of_others() -> None:
    """Otherwise a fast engine would never try a worker that was not measured yet, and never learn."""
    bench = Bench()
    bench.match()
    assert bench.port.assumed is None
    for tokens in (200, 400, 800) * 10:
        bench.load.model.saw_prefill(HERE, new_tokens=tokens, cached_tokens=0, seconds=tokens / 50_000)
    bench.match(of_length("next", 500))
    assert bench.port.assumed == bench.load.model.prefill(HERE)


@pytest.mark.parametrize(
    ("reason", "blamed"),
    [
        pytest.param("bad_chunk", True, id="a bad chunk"),
        pytest.param("deadline", True, id="a stall"),
        pytest.param("peer_lost", False, id="a lost peer, which its link knows"),
        pytest.param("aborted", False, id="a client that went away"),
        pytest.param("no_room", False, id="our own cache being full"),
    ],
)
def test_only_what_a_worker_did_wrong_counts_against_it(reason: str, blamed: bool) -> None:
    bench = Bench()
    bench.port.events.append(PeerJoined(PEER))
    if reason == "no_room":
        bench.match()
        bench.accepted()
        assert bench.match(free=10) == NotYet()
        bench.now += 1_000
        assert bench.match(free=10) == PrefillLocally("timeout_started")
    else:
        bench.loading()
    match reason:
        case "bad_chunk":
            bench.side.reports([RankReport(0, receive_failed=(("r1", "bad_chunk"),))])
        case "deadline":
            bench.now += 1_000
        case "peer_lost":
            bench.port.events.append(PeerLeft("p:1", "peer_lost"))
        case "aborted":
            bench.side.finished("r1")
    bench.side.step()
    assert [what for what, *_ in bench.port.sent if what == "failed"] == ["failed"] * blamed


def test_what_was_decided_can_be_read_in_the_snapshot() -> None:
    bench = Bench()
    bench.match(of_length("short", 10))
    bench.match()
    view = bench.side.snapshot()
    log = view["decision_log"]
    assert isinstance(log, list)
    assert [(row["request_id"], row["action"], row["reason"]) for row in log] == [
        ("short", "local", "short_prompt"),
        ("r1", "offload", "over_threshold"),
    ]
    assert isinstance(bench.match(), NotYet | Claim)
    assert view["decisions"] == {"short_prompt": 1, "over_threshold": 1}
