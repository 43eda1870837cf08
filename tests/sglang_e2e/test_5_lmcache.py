"""A prefill server whose settings name an LMCache server: prefixes that it lost come back, and are sent on as ever.

In all tests before these it ran without that server, and said so. Ordered: the last one ends it.
"""

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from lmcache_servers import CHUNK, holds_nothing_locked
from sglang_e2e.client import Offloads, at_once, prompt_of, same_tokens
from sglang_e2e.conftest import TOKEN_BYTES, Fleet, connected, is_quiet

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

TOKENS = 700
WHOLE_TOKENS = TOKENS // CHUNK * CHUNK


@pytest.fixture(scope="module")
def beside_lmcache(fleet: Fleet) -> Iterator[Fleet]:
    assert fleet.prefill.snapshot()["lmcache"]["inactive_reason"], "nothing has ever answered there"
    fleet.lmcache.start()
    fleet.prefill.when(is_connected)
    yield fleet
    fleet.lmcache.stop()


@pytest.fixture
def cold(beside_lmcache: Fleet, pair: Fleet) -> Iterator[Fleet]:
    """No engine holds anything; afterwards nothing is left behind on either server."""
    assert beside_lmcache is pair
    pair.prefill.flush()
    yield pair
    pair.prefill.when(lambda v: is_quiet(v) and not v["lmcache"]["tracked_requests"])


def is_connected(view: dict[str, Any]) -> bool:
    return not view["lmcache"]["inactive_reason"]


def totals(fleet: Fleet) -> dict[str, int]:
    counted: dict[str, int] = fleet.prefill.snapshot()["lmcache"]["totals"]
    return counted


def store(fleet: Fleet, prompt: list[int]) -> None:
    """Have the prefill server compute it, LMCache store it, and both engines forget it."""
    stored = totals(fleet).get("stored_chunks", 0)
    fleet.decode.when(connected)
    fleet.decode.generate(prompt)
    fleet.prefill.when(lambda v: v["lmcache"]["totals"].get("stored_chunks", 0) >= stored + len(prompt) // CHUNK)
    fleet.decode.flush()
    fleet.prefill.flush()
    fleet.decode.when(connected)


def computed_last(fleet: Fleet) -> tuple[int, int]:
    """(tokens computed, tokens cached) in the prefill server's last forward."""
    log = (fleet.folder / "prefill.log").read_text()
    return tuple(map(int, re.findall(r"#new-token: (\d+), #cached-token: (\d+)", log)[-1]))  # type: ignore[return-value]


def test_a_prefix_that_the_prefill_server_lost_comes_from_lmcache(cold: Fleet) -> None:
    prompt = prompt_of(TOKENS, seed=60)
    store(cold, prompt)
    loaded = totals(cold).get("store_hit_tokens", 0)
    counted = Offloads(cold.decode)
    got = cold.decode.generate(prompt)
    cold.prefill.when(lambda _: computed_last(cold) == (TOKENS - WHOLE_TOKENS, WHOLE_TOKENS))  # logged after sending
    assert totals(cold)["store_hit_tokens"] - loaded == WHOLE_TOKENS
    sent = counted.totals()
    assert (sent["landed"], sent["fallbacks"]) == (1, 0)
    assert sent["raw_bytes"] == (TOKENS - 1) * TOKEN_BYTES, "the decode server gets all of it"
    assert same_tokens(got, cold.local(prompt))
    cold.lmcache.when(holds_nothing_locked)


def test_only_what_the_prefill_server_lacks_is_loaded_and_only_what_lmcache_lacks_is_stored(cold: Fleet) -> None:
    prompt, longer = prompt_of(TOKENS, seed=61), prompt_of(TOKENS, seed=61) + prompt_of(300, seed=62)
    store(cold, prompt)
    cold.decode.generate(prompt[:200])
    before = totals(cold)
    cold.decode.flush()
    got = cold.decode.generate(longer)
    cold.prefill.when(lambda v: not v["lmcache"]["tracked_requests"] and not v["lmcache"]["backlog_bytes"])
    after = totals(cold)
    assert after["store_hit_tokens"] - before["store_hit_tokens"] == WHOLE_TOKENS - 192
    assert after["stored_chunks"] - before["stored_chunks"] == len(longer) // CHUNK - WHOLE_TOKENS // CHUNK
    assert same_tokens(got, cold.local(longer))


def test_eight_at_once(cold: Fleet) -> None:
    shared = prompt_of(400, seed=63)
    prompts = [shared + prompt_of(100 + 40 * number, seed=64 + number) for number in range(8)]
    store(cold, shared)
    counted = Offloads(cold.decode)
    got = at_once([lambda p=p: cold.decode.generate(p) for p in prompts])
    sent = counted.totals()
    assert (sent["landed"], sent["fallbacks"]) == (8, 0)
    for prompt, answer in zip(prompts, got, strict=True):
        assert same_tokens(answer, cold.local(prompt))


def test_a_request_that_is_aborted_while_lmcache_is_asked_leaves_nothing(cold: Fleet) -> None:
    prompt = prompt_of(TOKENS, seed=75)
    store(cold, prompt)
    with ThreadPoolExecutor(1) as pool:
        with cold.lmcache.hanging():
            body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 4}, "rid": "abort-lmcache"}
            future = pool.submit(cold.decode.post, "/generate", **body)
            cold.prefill.when(lambda v: v["lmcache"]["unanswered_lookups"] == 1)
            aborted = cold.decode.http.post(f"{cold.decode.url}/abort_request", json={"rid": body["rid"]})
            assert aborted.status_code == 200
            cold.prefill.when(lambda v: not v["lmcache"]["tracked_requests"])
        assert future.result(timeout=60)["meta_info"]["finish_reason"]["type"] == "abort"
    cold.prefill.when(is_connected)


def test_a_server_that_hangs_costs_a_bounded_wait_once(cold: Fleet) -> None:
    prompt = prompt_of(TOKENS, seed=76)
    store(cold, prompt)
    local = cold.local(prompt)
    loaded = totals(cold).get("store_hit_tokens", 0)
    with cold.lmcache.hanging():
        started = time.monotonic()
        got = cold.decode.generate(prompt)
        took_s = time.monotonic() - started
        cold.prefill.when(lambda v: not is_connected(v))
    assert same_tokens(got, local)
    assert totals(cold).get("store_hit_tokens", 0) == loaded
    assert took_s < 60
    cold.prefill.when(is_connected)


def test_a_server_that_dies_costs_no_token(cold: Fleet) -> None:
    prompt = prompt_of(TOKENS, seed=77)
    store(cold, prompt)
    cold.lmcache.stop()
    counted = Offloads(cold.decode)
    got = cold.decode.generate(prompt)
    assert (counted.totals()["landed"], counted.totals()["fallbacks"]) == (1, 0)
    assert same_tokens(got, cold.local(prompt))
    cold.prefill.when(lambda v: not is_connected(v))
    assert "serving without it until it answers" in (cold.folder / "prefill.log").read_text()
