"""What every connector owes its engine and its peers, whatever the engine: without an engine, a network or a clock."""

import random
from collections.abc import Callable

import pytest
import torch
from contract.rig import GEOMETRY, PAGE, SEED, Contract

from disagg_plugin.kv.geometry import HeadRange
from disagg_plugin.testing import PendingWrite, canonical_noise

TOKENS = 200
PROMPT = list(range(1_000, 1_000 + TOKENS))


def expected(tokens: int) -> torch.Tensor:
    return canonical_noise(GEOMETRY, HeadRange(0, GEOMETRY.kv_heads), SEED, TOKENS)[:, :, :, :tokens]


def deliver(contract: Contract, order: Callable[[list[PendingWrite]], list[PendingWrite]] = list) -> None:
    """Let every chunk land that is under way or still comes, in the given order of each round."""
    while contract.network.pending:
        for write in order(list(contract.network.pending)):
            contract.network.deliver(write)
        contract.turn(2)


def test_a_short_prompt_is_not_offered_and_runs_at_once(contract: Contract) -> None:
    contract.rig.send("r", PROMPT[:20])
    contract.turn()
    assert contract.port.offers == []
    assert contract.rig.runnable("r") == 0
    contract.rig.end("r")
    contract.assert_nothing_leaked()


def test_an_offer_carries_the_prompt_and_holds_nothing(contract: Contract) -> None:
    contract.rig.send("r", PROMPT)
    contract.turn(3)
    (call,) = contract.port.offers
    assert list(call.token_ids) == PROMPT
    assert contract.rig.runnable("r") is None
    assert contract.rig.pages_taken() == 0


def test_pages_are_taken_when_the_prefill_starts_and_all_but_the_last_token_is_asked_for(contract: Contract) -> None:
    contract.rig.send("r", PROMPT)
    contract.turn()
    call = contract.accept()
    assert contract.port.readies == [(call.transfer_id, 0, TOKENS - 1)]
    assert contract.rig.pages_taken() == -(-TOKENS // PAGE)


@pytest.mark.parametrize("seed", range(6))
def test_chunks_may_land_in_any_order(contract: Contract, seed: int) -> None:
    contract.rig.send("r", PROMPT)
    contract.turn()
    call = contract.accept()
    contract.peer.compute(call, contract.port.readies[-1], TOKENS)
    assert len(contract.network.pending) > 2
    shuffler = random.Random(seed)
    deliver(contract, lambda writes: shuffler.sample(writes, len(writes)))
    contract.end_prefill(call)
    contract.turn(2)
    cached = contract.rig.runnable("r")
    assert cached in (TOKENS - 1, (TOKENS - 1) // PAGE * PAGE)
    assert torch.equal(contract.rig.kv_of("r", cached), expected(cached))
    contract.rig.end("r")
    contract.assert_nothing_leaked()


@pytest.mark.parametrize("reason", ["refused_queue_full", "http_500", "http_connection_lost"])
def test_a_prefill_that_fails_before_it_starts_is_done_here(contract: Contract, reason: str) -> None:
    contract.rig.send("r", PROMPT)
    contract.turn()
    contract.fail(contract.port.offers[-1], reason)
    assert contract.rig.runnable("r") == 0
    contract.rig.end("r")
    contract.assert_nothing_leaked()


def test_what_landed_before_a_failure_is_kept(contract: Contract) -> None:
    contract.rig.send("r", PROMPT)
    contract.turn()
    call = contract.accept()
    contract.peer.compute(call, contract.port.readies[-1], 100)
    deliver(contract)
    contract.fail(call, "http_connection_lost")
    assert contract.rig.runnable("r") == 100 // PAGE * PAGE
    kept = contract.rig.runnable("r")
    assert torch.equal(contract.rig.kv_of("r", kept), expected(kept))
    contract.rig.end("r")
    contract.peer.plane.apply([])
    contract.assert_nothing_leaked_here()


def test_a_chunk_that_is_damaged_twice_is_never_used(contract: Contract) -> None:
    contract.rig.send("r", PROMPT)
    contract.turn()
    call = contract.accept()
    contract.peer.compute(call, contract.port.readies[-1], TOKENS)
    for _ in range(8):
        for write in list(contract.network.pending):
            contract.network.deliver(write, flip_byte=200)
        contract.turn(2)
    assert contract.rig.runnable("r") == 0
    assert contract.rig.plane.counters()["checksum_failures"] > 0
    contract.rig.end("r")
    contract.assert_nothing_leaked_here()


@pytest.mark.parametrize("state", ["offered", "allocated", "streaming", "runnable"])
def test_an_abort_in_any_state_leaves_nothing(contract: Contract, state: str) -> None:
    contract.rig.send("r", PROMPT)
    contract.turn()
    if state != "offered":
        call = contract.accept()
        if state != "allocated":
            contract.peer.compute(call, contract.port.readies[-1], TOKENS if state == "runnable" else 100)
            deliver(contract)
    contract.rig.abort("r")
    contract.turn(3)
    assert contract.rig.runnable("r") is None
    assert contract.port.cancels or state == "runnable"
    contract.assert_nothing_leaked_here()


def test_a_write_that_lands_after_the_abort_touches_no_page(contract: Contract) -> None:
    contract.rig.send("r", PROMPT)
    contract.turn()
    call = contract.accept()
    contract.peer.compute(call, contract.port.readies[-1], TOKENS)
    contract.rig.abort("r")
    contract.turn(3)
    deliver(contract)
    assert contract.rig.plane.counters()["chunks_received"] == 0
    contract.assert_nothing_leaked_here()
