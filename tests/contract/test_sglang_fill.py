"""What the decode role owes SGLang beyond the contract: its queue limit, its pool, and its life after our errors."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from contract.rig import PAGE, PAGES, Contract

from disagg_plugin.control.decode_port import OfferCall

if TYPE_CHECKING:
    from contract.sglang_rig import SglangRig

    from disagg_plugin.control.prompt_export import ExportedPrompt

TOKENS = 200
PROMPT = list(range(1_000, 1_000 + TOKENS))
OTHER = list(range(5_000, 5_000 + TOKENS))


@pytest.fixture
def rig(contract: Contract) -> "SglangRig":
    return cast("SglangRig", contract.rig)


def land(contract: Contract, request_id: str, prompt: list[int]) -> None:
    """Send a request and let its KV arrive; it is queued when this returns."""
    contract.rig.send(request_id, prompt)
    contract.turn()
    call = contract.accept()
    deliver(contract, call)


def deliver(contract: Contract, call: OfferCall) -> None:
    """Everything that P computed of a prompt arrives."""
    contract.peer.compute(call, contract.port.readies[-1], TOKENS)
    while contract.network.pending:
        for write in list(contract.network.pending):
            contract.network.deliver(write)
        contract.turn(2)


def test_what_landed_stays_locked_while_the_engine_computes(contract: Contract, rig: "SglangRig") -> None:
    rig.running.add("somebody")
    land(contract, "r", PROMPT)
    contract.turn(3)
    assert len(rig.tree.locks) == 1
    rig.end("r")
    contract.turn()
    assert rig.tree.locks == []


@pytest.mark.parametrize("paused", [False, True], ids=["nothing runs", "the engine is paused"])
def test_what_landed_is_unlocked_when_the_lock_may_be_what_it_waits_for(
    contract: Contract, rig: "SglangRig", paused: bool
) -> None:
    """Else prompts that fill the pool together would keep each other out of it for ever."""
    if paused:
        rig.running.add("somebody")
    land(contract, "r", PROMPT)
    rig.scheduler._engine_paused = paused
    contract.turn(2)
    assert rig.runnable("r") == TOKENS // PAGE * PAGE, "still queued, still cached"
    assert rig.tree.locks == []
    rig.running.clear()
    rig.end("r")
    contract.assert_nothing_leaked()


def test_what_waits_for_kv_counts_against_the_queue_limit(contract: Contract, rig: "SglangRig") -> None:
    rig.scheduler.max_queued_requests = 1
    rig.send("r", PROMPT)
    rig.send("one too many", OTHER)
    contract.turn()
    assert len(contract.port.offers) == 1
    assert rig.fill.exceeds_queue_limit(rig.requests["one too many"])
    assert not rig.fill.take(rig.requests["one too many"], lambda: None), "SGLang refuses it"


def test_a_request_that_was_let_in_is_not_refused_when_its_kv_has_landed(contract: Contract, rig: "SglangRig") -> None:
    rig.scheduler.max_queued_requests = 1
    land(contract, "r", PROMPT)
    assert not rig.fill.exceeds_queue_limit(rig.requests["r"])


def test_a_request_that_sglang_drops_is_forgotten(contract: Contract, rig: "SglangRig") -> None:
    rig.running.add("somebody")  # or the safety net would catch it
    rig.send("short", PROMPT[:10])
    rig.fill.dropped(rig.requests["short"])
    rig.scheduler.waiting_queue.clear()
    contract.assert_nothing_leaked_here()


@pytest.mark.parametrize("state", ["waiting", "receiving", "queued"])
def test_after_an_error_of_ours_every_request_is_sglangs_and_no_page_is_lost(
    contract: Contract, rig: "SglangRig", state: str
) -> None:
    if state == "queued":
        rig.running.add("somebody")
        land(contract, "r", PROMPT)
    else:
        rig.send("r", PROMPT)
        contract.turn()
        if state == "receiving":
            contract.accept()
    rig.fill.give_up()
    assert rig.runnable("r") == (TOKENS // PAGE * PAGE if state == "queued" else 0)
    assert [req.rid for req in rig.scheduler.waiting_queue] == ["r"]
    assert rig.tree.locks == []
    assert rig.pages_taken() == 0


@pytest.mark.parametrize("state", ["waiting", "receiving"])
def test_after_an_update_of_the_weights_no_kv_of_the_old_ones_is_used(
    contract: Contract, rig: "SglangRig", state: str
) -> None:
    rig.send("r", PROMPT)
    contract.turn()
    if state == "receiving":
        call = contract.accept()
    rig.fill.stop("weights_updated")
    if state == "receiving":
        deliver(contract, call)
    assert rig.runnable("r") == 0
    rig.end("r")
    rig.send("later", OTHER)
    assert rig.runnable("later") == 0
    assert rig.decode.snapshot()["decisions"]["weights_updated"] == 1
    rig.end("later")
    contract.assert_nothing_leaked_here()


def test_a_room_without_a_port_is_no_route(contract: Contract, rig: "SglangRig") -> None:
    rig.send("r", PROMPT, bootstrap_room=5, bootstrap_host="p", bootstrap_port=None)
    assert contract.port.offers == []
    assert rig.runnable("r") == 0


def test_of_two_prompts_that_begin_alike_the_second_needs_its_own_rest_only(
    contract: Contract, rig: "SglangRig"
) -> None:
    rig.running.add("somebody")
    long = [*range(1_000, 1_400)]
    rig.send("first", long)
    rig.send("second", [*long[:-10], *range(30_000, 30_010)])
    contract.turn(3)
    (call,) = contract.port.offers
    contract.accept()
    contract.peer.compute(call, contract.port.readies[-1], len(long))
    while contract.network.pending:
        for write in list(contract.network.pending):
            contract.network.deliver(write)
        contract.turn(2)
    contract.turn(2)
    assert rig.runnable("second") == 390 // PAGE * PAGE, "too little is left to ask anybody for"
    assert len(contract.port.offers) == 1


def test_what_lmcache_filled_is_found_in_the_prefix_cache(rig: "SglangRig") -> None:
    from disagg_sglang.tree_pages import ExportedPrefixes, TreePages

    cache = ExportedPrefixes(TreePages(rig.scheduler))
    prompt = cast("ExportedPrompt", SimpleNamespace(prompt=PROMPT, cache_salt=""))
    room = cache.reserve(prompt, 4 * PAGE)
    assert room is not None
    assert (room.cached_tokens, len(room.pages)) == (0, 4)
    cache.publish(room, 4 * PAGE)
    assert cache.cached_tokens(prompt) == 4 * PAGE
    more = cache.reserve(prompt, 6 * PAGE)
    assert more is not None
    assert (more.cached_tokens, more.pages[:4]) == (4 * PAGE, room.pages)
    assert len(rig.tree.locks) == 1, "nothing of it is evicted while the rest is filled"
    cache.cancel(more)
    assert (rig.tree.locks, rig.pages_taken()) == ([], 0)
    assert cache.reserve(prompt, PAGES * PAGE) is None
    assert (rig.tree.locks, rig.pages_taken()) == ([], 0)
