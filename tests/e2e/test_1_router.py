"""The classical flow on real engines: a router that knows only NixlConnector's fields drives P, then D."""

from typing import Any

import pytest
from e2e.client import Engine, same_tokens
from e2e.conftest import BLOCK, TINY_TOKEN_BYTES, Fleet, settle
from e2e.offloads import Offloads, prompt_of
from sequential_proxy import SequentialProxy

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


def through(proxy: SequentialProxy, fleet: Fleet) -> Engine:
    return Engine(proxy.url, fleet.decode.model)


@pytest.mark.parametrize("tokens", [5, BLOCK, 400, 1_500, 3_000])
def test_a_prompt_that_a_router_had_prefilled_gives_what_a_local_prefill_gives(pair: Fleet, tokens: int) -> None:
    prompt = prompt_of(tokens, seed=70)
    counted = Offloads(pair.decode)
    with SequentialProxy(pair.prefill.url, pair.decode.url) as proxy:
        got = through(proxy, pair).complete(prompt, cache_salt=f"router-{tokens}")
    totals = counted.totals()
    assert (totals["offered"], totals["landed"], totals["fallbacks"]) == (1, 1, 0)
    assert totals["raw_bytes"] == (tokens - 1) * TINY_TOKEN_BYTES
    assert same_tokens(got, pair.stock.complete(prompt, cache_salt="local"))
    (params,) = proxy.first_halves
    assert params["do_remote_prefill"] is True
    assert params["remote_port"] == pair.prefill.side_port
    assert params["remote_block_ids"]


def test_a_routed_request_may_stream(pair: Fleet) -> None:
    prompt = prompt_of(500, seed=71)
    with SequentialProxy(pair.prefill.url, pair.decode.url) as proxy:
        got = through(proxy, pair).stream(prompt, cache_salt="router-stream")
    assert got == pair.stock.stream(prompt, cache_salt="local")


def test_what_decode_has_cached_does_not_travel_and_prefill_lets_go_of_it(pair: Fleet) -> None:
    prompt = prompt_of(700, seed=72)
    with SequentialProxy(pair.prefill.url, pair.decode.url) as proxy:
        engine = through(proxy, pair)
        engine.complete(prompt, cache_salt="router-cached")
        counted = Offloads(pair.decode)
        engine.complete([*prompt, 11, 12, 13], cache_salt="router-cached")
        assert counted.totals()["raw_bytes"] == (702 - 700 // BLOCK * BLOCK) * TINY_TOKEN_BYTES


def test_the_answer_waits_at_prefill_until_decode_asks(pair: Fleet) -> None:
    """A router that takes its time: the KV is held, not computed a second time."""
    held: list[dict[str, Any]] = []

    def look(params: Any) -> Any:
        held.append(pair.prefill.when(lambda v: any(t["state"] == "held" for t in v["prefill"]["open"])))
        return params

    with SequentialProxy(pair.prefill.url, pair.decode.url, between=look) as proxy:
        through(proxy, pair).complete(prompt_of(600, seed=73), cache_salt="router-held")
    (view,) = held
    assert view["prefill"]["held_tokens"] == 600
    settle(pair.prefill)


def test_a_host_that_nobody_allowed_is_not_connected_to(pair: Fleet) -> None:
    prompt = prompt_of(400, seed=74)
    counted = Offloads(pair.decode)

    def elsewhere(params: Any) -> Any:
        return {**params, "remote_host": "192.0.2.7", "remote_engine_id": "nobody"}

    with SequentialProxy(pair.prefill.url, pair.decode.url, between=elsewhere) as proxy:
        got = through(proxy, pair).complete(prompt, cache_salt="router-elsewhere")
        assert same_tokens(got, pair.stock.complete(prompt, cache_salt="local"))
        totals = counted.totals()
        assert (totals["offered"], totals["landed"]) == (0, 0)
        assert pair.decode.snapshot()["decode"]["decisions"]["unknown_holder"] >= 1
        transfer_id = proxy.first_halves[0]["remote_request_id"]
    release(pair, transfer_id)


def test_kv_of_another_prompt_is_not_handed_over(pair: Fleet) -> None:
    """A client that mixes two requests up, or tries to read somebody else's prompt."""
    one, other = prompt_of(400, seed=75), prompt_of(400, seed=76)
    counted = Offloads(pair.decode)
    with SequentialProxy(pair.prefill.url, pair.decode.url) as proxy:
        params = proxy.prefill("/v1/completions", {"model": pair.prefill.model, "prompt": one, "max_tokens": 1})
        got = pair.decode.complete(other, cache_salt="router-mixed", kv_transfer_params=params)
    assert same_tokens(got, pair.stock.complete(other, cache_salt="local"))
    assert counted.totals() | {"offered": 1} == {
        "landed": 0,
        "wire_bytes": 0,
        "raw_bytes": 0,
        "offered": 1,
        "fallbacks": 1,
    }
    release(pair, params["remote_request_id"])


def test_a_client_that_leaves_before_it_is_served_lets_prefill_go(pair: Fleet) -> None:
    """prompt_logprobs keeps the prompt on D; what P holds for it is given up at once, not when the lease ends."""
    prompt = prompt_of(300, seed=77)
    before = pair.prefill.snapshot()["prefill"]
    with SequentialProxy(pair.prefill.url, pair.decode.url) as proxy:
        params = proxy.prefill("/v1/completions", {"model": pair.prefill.model, "prompt": prompt, "max_tokens": 1})
    pair.decode.complete(prompt, cache_salt="router-logprobs", kv_transfer_params=params, prompt_logprobs=1)
    view = settle(pair.prefill)
    assert view["prefill"]["totals"]["held"] == before["totals"].get("held", 0) + 1
    assert view["prefill"]["drops"]["prompt_logprobs"] == before["drops"].get("prompt_logprobs", 0) + 1


def release(fleet: Fleet, transfer_id: str) -> None:
    """Let P go of what nobody fetched, as a decode engine that does not need it: the lease would take 30 s."""
    fleet.decode.complete([1, 2, 3], max_tokens=1, kv_transfer_params=params_of(fleet, transfer_id), prompt_logprobs=1)
    settle(fleet.prefill)


def params_of(fleet: Fleet, transfer_id: str) -> dict[str, Any]:
    return {
        "do_remote_prefill": True,
        "remote_request_id": transfer_id,
        "remote_host": "127.0.0.1",
        "remote_port": fleet.prefill.side_port,
    }
