"""Whatever happens to the prefill server or the client: right tokens in the same request, and nothing leaks.

Ordered: later tests kill and replace servers.
"""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from engine_processes import SGLANG_STANDS_TIMES, Slices, end_tree, is_alive, slowed
from sglang_e2e.client import Answer, Engine, Offloads, at_once, prompt_of, same_tokens
from sglang_e2e.conftest import PREFILL_QUEUE, Fleet, connected, is_quiet, offload

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


@contextmanager
def stopped(engine: Engine) -> Iterator[None]:
    """A server that hangs for the body."""
    end_tree(engine, signal.SIGSTOP)
    try:
        yield
    finally:
        end_tree(engine, signal.SIGCONT)


@contextmanager
def deaf(engine: Engine) -> Iterator[None]:
    """A server whose API process hangs for the body: its scheduler lives, and what it accepts does not arrive."""
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(engine.pid, signal.SIGCONT)


def held_back(view: dict[str, Any]) -> int:
    """Requests that wait for KV; pages are given to those at once whose prefill should start right away."""
    return int(view["waiting"]["waiting"] + view["waiting"]["receiving"])


def chunks_received(view: dict[str, Any]) -> int:
    return sum(rank["chunks_received"] for rank in view["decode"]["ranks"].values())


@contextmanager
def offered(pair: Fleet, prompt: list[int], **more: Any) -> Iterator[Future[Answer]]:
    """A request that waits for the prefill server, which does not get its prompt for the body."""
    with ThreadPoolExecutor(1) as pool, deaf(pair.prefill):
        held = held_back(pair.decode.snapshot())
        future = pool.submit(pair.decode.generate, prompt, **more)
        pair.decode.when(lambda v: held_back(v) > held)
        yield future


@contextmanager
def being_filled(pair: Fleet, prompt: list[int], **more: Any) -> Iterator[tuple[Future[Answer], Slices]]:
    """A request of which some KV has come, and most has not: the prefill server runs in slices."""
    before = chunks_received(pair.decode.snapshot())
    with offered(pair, prompt, **more) as future, slowed(pair.prefill, SGLANG_STANDS_TIMES) as slices:
        pair.decode.when(lambda v: chunks_received(v) > before)
        yield future, slices


def abort(pair: Fleet, future: Future[Answer], rid: str) -> None:
    """As SGLang does when a client goes away."""
    assert pair.decode.http.post(f"{pair.decode.url}/abort_request", json={"rid": rid}).status_code == 200
    assert future.result(timeout=60).finish_reason == "abort"


def test_requests_that_are_aborted_while_they_wait_leave_nothing(pair: Fleet) -> None:
    """Two prompts fill the KV that transfers may hold; the third gets no pages before one of them has gone."""
    counted = pair.decode.snapshot()["decode"]["totals"].get("aborted", 0)
    rids = [f"waits-{number}" for number in range(3)]
    with ExitStack() as stack:
        futures = [
            stack.enter_context(offered(pair, prompt_of(3_800, seed=25 + number), rid=rid))
            for number, rid in enumerate(rids)
        ]
        waiting = pair.decode.when(lambda v: held_back(v) == 3)["waiting"]["waiting"]
        for rid, future in reversed(list(zip(rids, futures, strict=True))):
            abort(pair, future, rid)
    assert waiting >= 1
    pair.decode.when(connected)
    pair.prefill.when(is_quiet)
    assert pair.decode.when(is_quiet)["decode"]["totals"]["aborted"] == counted + 3


def test_a_request_that_is_aborted_while_its_pages_are_filled_leaves_nothing(pair: Fleet) -> None:
    counted = pair.decode.snapshot()["decode"]["totals"].get("aborted", 0)
    with being_filled(pair, prompt_of(3_800, seed=29), rid="filled") as (future, slices):
        slices.stand()
        assert pair.decode.snapshot()["waiting"]["receiving"] == 1
        abort(pair, future, "filled")
    pair.prefill.when(is_quiet)
    assert pair.decode.when(is_quiet)["decode"]["totals"]["aborted"] == counted + 1


def refused(view: dict[str, Any]) -> int:
    return int(view["prefill_service"].get("refused_queue_full", 0))


def test_prompts_that_the_prefill_server_refuses_are_computed_here(pair: Fleet) -> None:
    """Its queue takes so many and no more, whatever the decode server thinks of it."""
    prompts = [prompt_of(100, seed=50 + number) for number in range(PREFILL_QUEUE + 4)]
    offload(pair.decode, prompt_of(100, seed=49))  # nothing is held against it
    counted, before = Offloads(pair.decode), refused(pair.prefill.snapshot())
    with ThreadPoolExecutor(len(prompts)) as pool:
        with deaf(pair.prefill):
            futures = [pool.submit(pair.decode.generate, prompt) for prompt in prompts]
            pair.prefill.when(lambda v: refused(v) - before >= 4)
            pair.decode.when(lambda v: held_back(v) == PREFILL_QUEUE)
            assert refused(pair.prefill.snapshot()) - before == 4
        got = [future.result(timeout=120) for future in futures]
    totals = counted.totals()
    assert (totals["landed"], totals["fallbacks"]) == (PREFILL_QUEUE, 4)
    for prompt, answer in zip(prompts, got, strict=True):
        assert same_tokens(answer, pair.local(prompt))


def loads(engine: Engine) -> Any:
    (load,) = engine.http.get(f"{engine.url}/v1/loads").json()["loads"]
    return load


def test_what_waits_for_kv_counts_in_sglangs_load_report(pair: Fleet) -> None:
    with ThreadPoolExecutor(3) as pool:
        with deaf(pair.prefill):
            futures = [pool.submit(pair.decode.generate, prompt_of(100, seed=80 + number)) for number in range(3)]
            pair.decode.when(lambda v: held_back(v) == 3)
            pair.decode.when(lambda _: loads(pair.decode)["num_waiting_reqs"] == 3)  # it is published at times
            load = loads(pair.decode)
            assert pair.decode.http.post(f"{pair.decode.url}/flush_cache").status_code != 200, "it is not idle"
        for future in futures:
            future.result(timeout=120)
    queues = load["disaggregation"]
    assert queues["mode"] == "decode"
    assert queues["decode_prealloc_queue_reqs"] + queues["decode_transfer_queue_reqs"] == 3


def test_a_prompt_that_the_prefill_server_gets_wrong_is_computed_here(pair: Fleet) -> None:
    """A router that sends the two servers different prompts under one number: their KV must never meet."""
    fields = {"bootstrap_host": "127.0.0.1", "bootstrap_port": pair.prefill.bootstrap_port, "bootstrap_room": 77}
    ours, other = prompt_of(300, seed=20), prompt_of(300, seed=21)
    counted = Offloads(pair.decode)

    def mislead() -> int:
        body = {"input_ids": other, "sampling_params": {"max_new_tokens": 1}, **fields}
        return pair.prefill.http.post(f"{pair.prefill.url}/generate", json=body).status_code

    status, got = at_once([mislead, lambda: pair.decode.generate(ours, **fields)])
    assert status == 500
    assert same_tokens(got, pair.local(ours))
    assert (counted.totals()["landed"], counted.totals()["fallbacks"]) == (0, 1)


def test_a_prefill_server_that_hangs_costs_seconds_and_no_token(pair: Fleet) -> None:
    prompt = prompt_of(2_000, seed=30)
    local = pair.local(prompt)
    counted = Offloads(pair.decode)
    with offered(pair, prompt) as future, stopped(pair.prefill):
        started = time.monotonic()
        got = future.result(timeout=120)
        took_s = time.monotonic() - started
    assert same_tokens(got, local)
    assert took_s < 60
    assert counted.totals()["fallbacks"] == 1
    pair.decode.when(connected)
    pair.prefill.when(is_quiet)


def test_a_prefill_server_that_dies_while_streaming_costs_only_what_did_not_land(pair: Fleet) -> None:
    prompt = prompt_of(3_800, seed=31)
    local = pair.local(prompt)
    counted = Offloads(pair.decode)
    with being_filled(pair, prompt) as (future, _):
        end_tree(pair.prefill, signal.SIGKILL)
        got = future.result(timeout=120)
    assert same_tokens(got, local)
    totals = counted.totals()
    assert (totals["landed"], totals["fallbacks"]) == (0, 1)
    assert 0 < got.cached_tokens < 3_799, "the prefix that had landed is kept"


def test_with_a_dead_prefill_server_prompts_are_prefilled_here(pair: Fleet) -> None:
    prompt = prompt_of(700, seed=32)
    if is_alive(pair.prefill):  # the test before has not run, or in another pair
        end_tree(pair.prefill, signal.SIGKILL)
    pair.decode.when(lambda v: not connected(v))
    counted = Offloads(pair.decode)
    got = pair.decode.generate(prompt)
    assert same_tokens(got, pair.local(prompt))
    assert counted.totals()["offered"] == 0


def test_a_restarted_prefill_server_is_used_again(pair: Fleet) -> None:
    pair.restart_prefill()
    pair.decode.when(connected)
    prompt = prompt_of(700, seed=33)
    counted = Offloads(pair.decode)
    got = pair.decode.generate(prompt)
    assert counted.totals()["landed"] == 1
    assert same_tokens(got, pair.local(prompt))
