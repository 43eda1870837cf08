"""Prompts that begin alike: one transfer brings what they share; nobody waits for ever, or for little."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given
from unit.control.decode_bench import Bench

from disagg_plugin.control.decode_port import Claim, NotYet, PromptView
from disagg_plugin.control.shared_prefixes import SHOWS_WITHIN_S, SharedPrefixes
from disagg_plugin.serving.prefix_hash import CHUNK_TOKENS, prefix_hashes

SYSTEM = tuple(range(1_280))  # ten chunks
WAIT_S = 10.0


def bench_that_shares(**transfer: float) -> Bench:
    return Bench(transfer={"shared_prefix_wait_s": WAIT_S, **transfer})


def prompt(number: int, own: int = 50, **more: object) -> PromptView:
    view = PromptView(f"r{number}", SYSTEM + tuple(range(5_000 * number, 5_000 * number + own)))
    return replace(view, **more)  # type: ignore[arg-type]


def land(bench: Bench, of: PromptView) -> None:
    """The first offer of the bench goes all the way."""
    bench.accepted()
    claim = bench.match(of)
    assert isinstance(claim, Claim)
    bench.side.allocated(of.request_id, (1, 2), claim.tokens)
    bench.side.load_completed(of.request_id)


def test_sixteen_prompts_with_one_beginning_are_one_offer() -> None:
    bench = bench_that_shares()
    prompts = [prompt(number) for number in range(1, 17)]
    assert [bench.match(one) for one in prompts] == [NotYet()] * 16
    assert len(bench.port.offers) == 1
    land(bench, prompts[0])
    for one in prompts[1:]:
        bench.match(one, cached=len(SYSTEM))
    assert len(bench.port.offers) == 1, "50 tokens are below the threshold"
    assert bench.side.totals["waited_for_shared_prefix"] == 15
    for one in prompts:
        bench.side.finished(one.request_id)
    assert bench.side.snapshot()["tracked_requests"] == 0


def test_a_long_rest_of_its_own_is_offered_after_what_is_shared() -> None:
    bench = bench_that_shares()
    first, second = prompt(1), prompt(2, own=900)
    bench.match(first)
    assert bench.match(second) == NotYet()
    land(bench, first)
    bench.match(second, cached=len(SYSTEM))
    assert [call.cached_tokens for call in bench.port.offers] == [0, len(SYSTEM)]


def test_until_the_cache_shows_it_a_landed_prefix_is_still_waited_for() -> None:
    """The engine hashes the blocks a step after it heard of them."""
    bench = bench_that_shares()
    first, second = prompt(1), prompt(2)
    bench.match(first)
    bench.match(second)
    land(bench, first)
    assert bench.match(second, cached=0) == NotYet()
    assert len(bench.port.offers) == 1
    bench.now += SHOWS_WITHIN_S + 0.01
    bench.match(second, cached=0)
    assert len(bench.port.offers) == 2, "evicted meanwhile: it needs a transfer of its own"


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (prompt(2, own=2_000), "most of it is its own"),
        (prompt(2, cache_salt="another tenant"), "another salt"),
        (prompt(2, lora="adapter"), "another adapter"),
        (prompt(2, priority=-1), "it is more urgent than the one before"),
        (PromptView("r2", tuple(range(9_000, 10_500))), "another beginning"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_others_do_not_wait(other: PromptView, why: str) -> None:
    bench = bench_that_shares()
    bench.match(prompt(1))
    bench.match(other)
    assert len(bench.port.offers) == 2, why


def test_a_wait_has_a_deadline() -> None:
    bench = bench_that_shares(offer_timeout_s=60.0)
    bench.match(prompt(1))
    assert bench.match(prompt(2)) == NotYet()
    bench.now += WAIT_S + 0.1
    bench.match(prompt(2))
    assert len(bench.port.offers) == 2


def test_when_the_first_one_is_aborted_the_next_one_takes_over() -> None:
    bench = bench_that_shares()
    prompts = [prompt(number) for number in range(1, 5)]
    for one in prompts:
        bench.match(one)
    bench.side.finished("r1")
    for one in prompts[1:]:
        bench.match(one)
    assert len(bench.port.offers) == 2


def test_a_request_that_waits_and_goes_away_leaves_nothing() -> None:
    bench = bench_that_shares()
    bench.match(prompt(1))
    bench.match(prompt(2))
    bench.side.finished("r2")
    bench.side.finished("r1")
    assert bench.side.snapshot()["tracked_requests"] == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["ask", "begin", "landed", "end", "wait"])), max_size=60))
def test_whatever_happens_every_request_is_let_go_within_its_deadline(steps: list[tuple[int, str]]) -> None:
    now = [0.0]
    shared = SharedPrefixes(WAIT_S, lambda: now[0])
    asked: dict[str, float] = {}
    for number, what in steps:
        name, ids = f"r{number}", SYSTEM[: CHUNK_TOKENS * (number + 3)]
        hashes = prefix_hashes(ids)
        if what == "ask":
            leader = shared.leader_of(name, len(ids), lambda h=hashes: h, cached_tokens=0, priority=0)
            assert leader != name
            if leader is None:
                asked.pop(name, None)
            else:
                asked.setdefault(name, now[0])
                assert now[0] <= asked[name] + WAIT_S
        elif what == "begin":
            shared.begin(name, hashes, priority=0)
        elif what == "landed":
            shared.landed(name)
        elif what == "end":
            shared.end(name)
            asked.pop(name, None)
        else:
            now[0] += 3.0
    for number in range(6):
        shared.end(f"r{number}")
    assert len(shared) == 0
    assert shared._owner == {}
