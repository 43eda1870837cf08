"""A prefill server that is to leave is asked for nothing more, and ends what it has begun. The last of this session."""

import os
import signal
from typing import Any

import pytest
from engine_processes import is_alive
from sglang_e2e.client import Offloads, prompt_of, same_tokens
from sglang_e2e.conftest import Fleet, connected
from sglang_e2e.test_2_faults import being_filled

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


def states(view: dict[str, Any]) -> set[str]:
    """How the decode server finds its prefill workers."""
    return {worker["state"] for worker in view["prefill_workers"]["workers"].values()}


def test_a_prefill_server_that_drains_is_not_asked_until_it_takes_prompts_again(pair: Fleet) -> None:
    drain = f"{pair.prefill.url}/disagg/drain"
    assert pair.prefill.http.post(drain).json() == {"draining": True}
    pair.decode.when(lambda v: states(v) == {"draining"})
    prompt, again = prompt_of(700, seed=60), prompt_of(700, seed=61)
    counted = Offloads(pair.decode)
    got = pair.decode.generate(prompt)
    assert (counted.totals()["offered"], counted.decisions()) == (0, {"draining": 1})
    assert same_tokens(got, pair.local(prompt))
    assert pair.prefill.http.delete(drain).json() == {"draining": False}
    pair.decode.when(connected)
    counted = Offloads(pair.decode)
    got = pair.decode.generate(again)
    assert counted.totals()["landed"] == 1
    assert same_tokens(got, pair.local(again))


def test_a_prefill_server_that_is_told_to_leave_ends_what_it_has_begun(pair: Fleet) -> None:
    """SIGTERM to its first process alone, as Kubernetes sends it."""
    prompt = prompt_of(3_800, seed=62)
    local = pair.local(prompt)
    counted = Offloads(pair.decode)
    with being_filled(pair, prompt) as (future, _):
        os.kill(pair.prefill.pid, signal.SIGTERM)
        pair.decode.when(lambda v: not connected(v))
    got = future.result(timeout=120)
    assert same_tokens(got, local)
    totals = counted.totals()
    assert (totals["offered"], totals["landed"], totals["fallbacks"]) == (1, 1, 0)
    pair.decode.when(lambda _: not is_alive(pair.prefill), within_s=90)
