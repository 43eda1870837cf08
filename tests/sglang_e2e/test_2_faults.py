"""Whatever happens to the prefill server or the client: right tokens in the same request, and nothing leaks.

Ordered: later tests kill and replace servers.
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from sglang_e2e.client import Engine, Offloads, at_once, prompt_of, same_tokens
from sglang_e2e.conftest import Fleet, connected, is_quiet

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


def signal_tree(engine: Engine, how: signal.Signals) -> None:
    """Signal every process of a server that this session started."""
    root = psutil.Process(engine.pid)
    for process in [*root.children(recursive=True), root]:
        os.kill(process.pid, how)


def is_receiving(view: dict[str, Any]) -> bool:
    ranks = view["decode"]["ranks"].values()
    return any(r.get("chunks_received", 0) and r.get("open_receives", 0) for r in ranks)


@pytest.mark.parametrize("state", ["waiting", "receiving"])
def test_a_client_that_goes_away_frees_everything_on_both_servers(pair: Fleet, state: str) -> None:
    prompt = prompt_of(3_800, seed=len(state))
    before = pair.decode.snapshot()["decode"]["totals"].get("aborted", 0)
    with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=60) as client:
        body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 4}, "stream": True}

        def send() -> str:
            try:
                client.post(f"{pair.decode.url}/generate", json=body)
            except (httpx.HTTPError, RuntimeError, OSError):
                return "gone"
            return "answered"

        future = pool.submit(send)
        pair.decode.when(lambda v: v["waiting"][state] > 0)
        client.close()
        assert future.result(timeout=60) == "gone"
    pair.decode.when(is_quiet)
    pair.prefill.when(is_quiet)
    assert pair.decode.snapshot()["decode"]["totals"].get("aborted", 0) == before + 1


def test_a_prefill_server_that_refuses_leaves_the_prompt_here(pair: Fleet) -> None:
    """Longer than it takes at once: ``prefill_queue_max`` offers at most, and the rest is served locally."""
    prompts = [prompt_of(200, seed=seed) for seed in range(20, 28)]
    counted = Offloads(pair.decode)
    answers = at_once([lambda p=p: pair.decode.generate(p, max_new_tokens=4) for p in prompts])
    assert counted.totals()["offered"] + sum(counted.decisions().values()) > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert same_tokens(answer, pair.local(prompt, max_new_tokens=4))


def test_a_prefill_server_that_hangs_costs_seconds_and_no_token(pair: Fleet) -> None:
    prompt = prompt_of(2_000, seed=30)
    local = pair.local(prompt)
    counted = Offloads(pair.decode)
    signal_tree(pair.prefill, signal.SIGSTOP)
    try:
        started = time.monotonic()
        got = pair.decode.generate(prompt)
        took_s = time.monotonic() - started
    finally:
        signal_tree(pair.prefill, signal.SIGCONT)
    assert same_tokens(got, local)
    assert took_s < 60
    assert counted.totals()["fallbacks"] == 1
    pair.decode.when(connected)
    pair.prefill.when(is_quiet)


def test_a_prefill_server_that_dies_while_streaming_costs_only_what_did_not_land(pair: Fleet) -> None:
    prompt = prompt_of(3_800, seed=31)
    local = pair.local(prompt)
    counted = Offloads(pair.decode)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(pair.decode.generate, prompt)
        pair.decode.when(is_receiving)
        signal_tree(pair.prefill, signal.SIGKILL)
        got = future.result(timeout=120)
    assert same_tokens(got, local)
    totals = counted.totals()
    assert (totals["landed"], totals["fallbacks"]) == (0, 1)
    assert 0 < got.cached_tokens < 3_799, "the prefix that had landed is kept"


def test_with_a_dead_prefill_server_prompts_are_prefilled_here(pair: Fleet) -> None:
    prompt = prompt_of(700, seed=32)
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
