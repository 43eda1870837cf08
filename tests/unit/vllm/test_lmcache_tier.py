"""LMCache's connector as our child, played by a strict double: which calls reach it, and what it is shown."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lmcache_double import (
    BLOCK,
    SETTINGS,
    Blocks,
    DisaggConnector,
    KVConnectorBase_V1,
    KVConnectorTransferResults,
    Pair,
    StrictChild,
    request,
    step_of,
)

from disagg_plugin.kv.dataplane import Completions
from disagg_vllm.lmcache_child import FORWARDED, NOT_FORWARDED, ShownRequest, salt_of
from disagg_vllm.lmcache_tier import LMCacheScheduler, TierStep
from disagg_vllm.surface import SURFACE


def test_every_method_of_the_engines_base_class_is_forwarded_or_left_out_for_a_reason() -> None:
    methods = {name for name in dir(KVConnectorBase_V1) if not name.startswith("_")}
    listed = FORWARDED | NOT_FORWARDED.keys()
    assert not FORWARDED & NOT_FORWARDED.keys()
    assert methods - listed == set(), "a new vLLM has methods that nobody thought about"
    later = {str(name).rpartition(".")[2] for name in SURFACE.names if name.first == "0.33.0"} | {"supports_sleep_mode"}
    assert listed - methods <= later, "nor may we think about what is gone"
    assert all(NOT_FORWARDED.values())


def test_what_is_listed_as_forwarded_reaches_the_child() -> None:
    pair = Pair()
    held = pair.load()
    pair.worker.register({})
    pair.worker.preempt(TierStep(metadata=object()))  # type: ignore[arg-type]
    pair.step()
    pair.step(step_of({"r": (399, 1)}))
    pair.scheduler.finished(held)
    connector = object.__new__(DisaggConnector)
    for name, tier in (("_scheduler", pair.scheduler), ("_worker", pair.worker)):
        setattr(connector, name, SimpleNamespace(tier=tier, bind_block_pool=lambda _: None))
    connector.take_events()
    connector.reset_cache()
    connector.bind_kv_cache_manager(SimpleNamespace(block_pool=None))
    connector.get_kv_connector_kv_cache_events()
    connector.get_mem_pool_context()
    connector.set_host_xfer_buffer_ops(None)
    connector.finish_forward()
    connector.reset_capture_state()
    connector.unregister_kv_caches()
    connector.restore_kv_caches()
    pair.scheduler.child.close()
    reached = pair.child.calls + pair.worker_child.calls
    assert FORWARDED - set(reached) == {"get_required_kvcache_layout"}, "a class method, asked before there is a child"


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=6)), min_size=2, max_size=6, unique=True))
def test_two_requests_share_a_salt_only_if_salt_and_adapter_are_equal(pairs: list[tuple[str, str]]) -> None:
    crafted = [("disagg-lora:" + salt, lora) for salt, lora in pairs]
    crafted += [(salt_of(salt, lora), "") for salt, lora in pairs if lora]
    every = {*pairs, *crafted}
    assert len({salt_of(salt, lora) for salt, lora in every}) == len(every)


def test_a_request_without_adapter_keeps_its_salt() -> None:
    assert ShownRequest(request(cache_salt="s")).cache_salt == "s"
    with_adapter = ShownRequest(request(cache_salt="s", lora_request=SimpleNamespace(lora_name="a")))
    assert with_adapter.cache_salt == "disagg-lora:1:a:s"
    assert with_adapter.prompt_token_ids[:2] == [0, 1]


def test_the_engine_hears_once_after_both_loads_whichever_is_first() -> None:
    for first in ("store", "wire"):
        pair = Pair()
        pair.load()
        store, wire = KVConnectorTransferResults(finished_recving={"r"}), Completions(received=("r",))
        if first == "store":
            pair.worker_child.results = store
        assert pair.step(own=wire if first == "wire" else None) == Completions()
        if first == "wire":
            pair.worker_child.results = store
        assert pair.step(own=wire if first == "store" else None) == Completions(received=("r",))
        assert pair.step() == Completions()


def test_the_store_is_told_of_what_came_over_the_wire_and_of_nothing_that_failed() -> None:
    pair = Pair()
    pair.load(found=256, wire=143)
    pair.worker_child.results = KVConnectorTransferResults(finished_recving={"r"})
    pair.step(own=Completions(received=("r",)))
    pair.step(step_of({"r": (399, 1)}))
    tracker = pair.child.trackers["r"]
    assert tracker["base"] + tracker["told"] == 400

    pair = Pair()
    pair.load(found=256, wire=143)
    pair.worker_child.results = KVConnectorTransferResults(finished_recving={"r"})
    pair.worker_child.errors = {3, 4}
    done = pair.step(own=Completions(received=("r",)))
    assert done == Completions(("r",), frozenset({3, 4}))
    pair.step(step_of({"r": (64, 100)}))
    tracker = pair.child.trackers["r"]
    assert tracker["base"] + tracker["told"] == 164
    assert pair.scheduler.snapshot()["totals"]["failed_loads"] == 1  # type: ignore[index]


def test_a_worker_whose_child_breaks_fails_its_loads_and_the_engine_goes_on_without_lmcache() -> None:
    pair = Pair()
    pair.worker_child.raises = "start_load_kv"
    pair.load(found=256, wire=143)
    done = pair.step()
    assert done == Completions(), "the wire's part is still on its way"
    done = pair.step(own=Completions(received=("r",)))
    assert done.received == ("r",)
    assert done.invalid_block_ids == frozenset(range(1, 9))
    assert "start_load_kv" in str(pair.scheduler.snapshot()["inactive_reason"])
    assert pair.scheduler.look_up(request("next"), 0) == 0


@pytest.mark.parametrize(
    "method", ["get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta", "request_finished"]
)
def test_an_exception_of_the_child_in_the_scheduler_ends_lmcache_and_not_the_engine(method: str) -> None:
    pair = Pair()
    pair.child.raises = method
    pair.child.answer = 256
    held = request()
    found = pair.scheduler.look_up(held, 0) or 0
    pair.scheduler.promise("r", 0, found)
    pair.scheduler.allocated(held, Blocks(*range(1, 14)), found)
    done = pair.step()
    if found and method != "request_finished":
        assert (done.received, done.invalid_block_ids) == (("r",), frozenset(range(1, 9))), "repaired by the engine"
    pair.step(step_of({"r": (0, 400)}))
    assert not pair.scheduler.finished(held) or method == "request_finished"
    assert pair.scheduler.snapshot()["inactive_reason"]


def test_an_abort_while_both_loads_run_keeps_the_blocks_until_the_last_has_ended() -> None:
    pair = Pair()
    held = pair.load()
    pair.step()
    assert not pair.scheduler.finished(held), "the engine waits for the load itself"
    assert pair.child.trackers == {}
    pair.worker_child.results = KVConnectorTransferResults(finished_recving={"r"})
    assert pair.step() == Completions(), "nothing is said to be saved"
    assert pair.step(own=Completions(received=("r",))).received == ("r",)


def test_an_answer_that_nobody_waits_for_any_more_is_given_back() -> None:
    pair = Pair()
    pair.child.answer = None
    held = request()
    assert pair.scheduler.look_up(held, 0) is None
    assert not pair.scheduler.finished(held)
    assert pair.scheduler.needs_steps
    pair.step()
    pair.child.answer = 256
    pair.step()
    assert (pair.child.locked, pair.child.trackers) == (set(), {})
    assert not pair.scheduler.needs_steps


def test_a_hit_that_is_not_used_is_unlocked() -> None:
    pair = Pair()
    pair.child.answer = 256
    held = request()
    pair.scheduler.look_up(held, 0)
    assert pair.child.locked == {"r"}
    assert not pair.scheduler.finished(held)
    assert (pair.child.locked, pair.child.trackers) == (set(), {})


def test_what_is_not_looked_up_is_not_shown_either() -> None:
    pair = Pair()
    for held in (request(skip_reading_prefix_cache=True), request(prompt_token_ids=None), request(resumable=True)):
        assert pair.scheduler.look_up(held, 0) == 0
        pair.scheduler.promise("r", 0, 0)
        assert pair.scheduler.allocated(held, Blocks(1), 0) == 0
        pair.step(step_of({"r": (0, 100)}))
        assert not pair.scheduler.finished(held)
    assert pair.child.trackers == {}


def test_the_blocks_of_a_request_that_is_saved_and_sent_are_released_after_both() -> None:
    pair = Pair()
    pair.child.answer = 0
    held = request()
    pair.scheduler.look_up(held, 0)
    pair.scheduler.promise("r", 0, 0)
    pair.scheduler.allocated(held, Blocks(*range(1, 14)), 0)
    pair.step(step_of({"r": (0, 400)}))
    assert pair.scheduler.finished(held)
    pair.scheduler.sent_by("r", store=True, wire=True)
    assert pair.step() == Completions(), "LMCache is done, the wire is not"
    assert pair.step(own=Completions(released=("r",))) == Completions(released=("r",))
    assert pair.worker.unexpected == 0


def test_a_worker_without_its_child_makes_the_scheduler_go_without() -> None:
    scheduler = LMCacheScheduler(StrictChild(), "", SETTINGS, block_size=BLOCK)
    assert scheduler.look_up(request(), 0) == 0, "not before all workers are there"
    scheduler.ready(["", "no LMCache server"])
    assert scheduler.look_up(request(), 0) == 0
    assert scheduler.snapshot()["inactive_reason"] == "no LMCache server"


def test_a_preempted_request_is_looked_up_again() -> None:
    pair = Pair()
    held = pair.load()
    pair.worker_child.results = KVConnectorTransferResults(finished_recving={"r"})
    pair.step(own=Completions(received=("r",)))
    pair.step(step_of({"r": (399, 1)}))
    pair.step(step_of({"r": (400, 1)}, new=False))
    pair.step(step_of(preempted={"r"}))
    pair.child.answer = 320
    assert pair.scheduler.look_up(held, 0) == 320
