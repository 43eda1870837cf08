"""Whatever happens to the prefill worker or the client: right text in the same request, and nothing leaks.

Ordered: later tests kill and replace engines.
"""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from e2e.client import Engine, Going, at_once, same_tokens
from e2e.conftest import Fleet, settings, settle
from e2e.offloads import Offloads, assert_offloaded_as_local, prompt_of
from engine_processes import end_tree, is_alive, slowed, stopped_models
from models import tiny

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


def chunks_received(view: dict[str, Any]) -> float:
    """Since the decode engine's start; a chunk counts once its KV stands in the engine's cache."""
    return sum(rank["chunks_received"] for rank in view["decode"]["ranks"].values())


def worker_states(view: dict[str, Any]) -> set[str]:
    """How the decode engine finds its prefill workers."""
    return {worker["state"] for worker in view["prefill_workers"]["workers"].values()}


def preemptions(engine: Engine) -> float:
    lines = httpx.get(f"{engine.url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_preemptions_total"))


def _ended_as(view: dict[str, Any], prompt_tokens: int) -> str | None:
    """Why the decode engine's last transfer of such a prompt failed, once it has ended."""
    ended = [transfer["failure"] for transfer in view["decode"]["recent"] if transfer["prompt_tokens"] == prompt_tokens]
    return ended[-1] if ended and not view["decode"]["open"] else None


@pytest.mark.parametrize("state", ["accepted", "streaming"])
def test_a_client_that_goes_away_frees_everything_on_both_sides(pair: Fleet, state: str) -> None:
    prompt = prompt_of({"accepted": 3_500, "streaming": 3_501}[state])
    with slowed(pair.prefill):
        going = Going(pair.decode, prompt, f"abort-{state}")
        if state == "streaming":
            pair.decode.when(lambda v: any(t["state"] == "ready" for t in v["decode"]["open"]))
        else:
            pair.decode.when(lambda v: bool(v["decode"]["open"]))
        going.goes_away()
        pair.decode.when(lambda v: _ended_as(v, len(prompt)) == "aborted")
    settle(pair.decode)
    settle(pair.prefill)


def test_a_clients_own_keys_change_nothing(pair: Fleet) -> None:
    """Neither on the decode engine, nor asked of the prefill engine directly."""
    forged = {"disagg": {"transfer_id": "ab" * 16, "nonce": 1, "host": "10.0.0.1", "port": 1, "slots": [0]}}
    prompt = prompt_of(700, seed=4)
    assert_offloaded_as_local(pair, prompt, cache_salt="forged", kv_transfer_params=forged)
    before = pair.prefill.snapshot()["prefill"]["totals"].get("unknown_transfer_ids", 0)
    got = pair.prefill.complete(prompt, cache_salt="forged", kv_transfer_params=forged)
    assert same_tokens(got, pair.stock.complete(prompt, cache_salt="local"))
    assert settle(pair.prefill)["prefill"]["totals"]["unknown_transfer_ids"] == before + 1


def test_a_preempted_request_is_computed_here(pair: Fleet) -> None:
    """Five offloaded prompts, and texts that the decode engine's cache has no room for.

    The prefill engine has computed the prompts before, so that all five arrive before a text is long.
    """
    prompts = [prompt_of(2_900, seed=20 + number) for number in range(5)]
    texts = {"max_tokens": 1_100}  # of which four are more than fits, should the fifth come late
    local = at_once([lambda p=p: pair.stock.complete(p, cache_salt="local", **texts) for p in prompts])
    for number, prompt in enumerate(prompts):
        pair.prefill.complete(prompt, cache_salt=f"preempt-{number}", max_tokens=1)
    counted, before = Offloads(pair.decode), preemptions(pair.decode)
    calls = [
        lambda prompt=prompt, number=number: pair.decode.complete(prompt, cache_salt=f"preempt-{number}", **texts)
        for number, prompt in enumerate(prompts)
    ]
    for got, wanted in zip(at_once(calls), local, strict=True):
        assert same_tokens(got, wanted)
    assert preemptions(pair.decode) > before
    totals = counted.totals()
    assert totals["landed"] >= 1, "those that wait for room while the others decode may be taken back"
    assert totals["offered"] <= 5, "what was preempted is not offered again"


def test_a_prefill_worker_that_stops_and_wakes_up_again(pair: Fleet) -> None:
    """What it writes after that is discarded; the prompts after that are its own again."""
    prompt = prompt_of(3_400, seed=6)
    local = pair.stock.complete(prompt, cache_salt="local")
    counted = Offloads(pair.decode)
    before = chunks_received(pair.decode.snapshot())
    with slowed(pair.prefill) as prefill, ThreadPoolExecutor(1) as pool:
        future = pool.submit(pair.decode.complete, prompt, cache_salt="stops")
        pair.decode.when(lambda v: chunks_received(v) > before, every_s=0.02)
        prefill.stand()
        got = future.result(timeout=120)
    assert same_tokens(got, local)
    totals = counted.totals()
    assert (totals["landed"], totals["fallbacks"]) == (0, 1)
    pair.decode.when(lambda v: any(w["healthy"] for w in v["prefill_workers"]["workers"].values()), within_s=60)
    assert_offloaded_as_local(pair, prompt_of(700, seed=5), cache_salt="awake")


def test_a_prefill_worker_that_dies_while_streaming_costs_only_time(pair: Fleet) -> None:
    prompt = prompt_of(3_500, seed=7)
    local = pair.stock.complete(prompt, cache_salt="local")
    counted = Offloads(pair.decode)
    before = chunks_received(pair.decode.snapshot())
    with slowed(pair.prefill), ThreadPoolExecutor(1) as pool:
        future = pool.submit(pair.decode.complete, prompt, cache_salt="dies")
        pair.decode.when(lambda v: chunks_received(v) > before, every_s=0.02)
        end_tree(pair.prefill, signal.SIGKILL)
        got = future.result(timeout=120)
    assert same_tokens(got, local)
    totals = counted.totals()
    assert (totals["landed"], totals["fallbacks"]) == (0, 1)
    recomputed = re.findall(r"rescheduled \((\d+) tokens affected\)", (pair.folder / "decode.log").read_text())
    assert 0 < int(recomputed[-1]) < 3_499, "the prefix that had landed is kept"


def test_with_a_dead_prefill_worker_prompts_are_prefilled_locally(pair: Fleet) -> None:
    prompt = prompt_of(700, seed=8)
    if is_alive(pair.prefill):  # the test before has not run, or in another pair
        end_tree(pair.prefill, signal.SIGKILL)
    pair.decode.when(lambda v: not any(w["healthy"] for w in v["prefill_workers"]["workers"].values()))
    counted = Offloads(pair.decode)
    got = pair.decode.complete(prompt, cache_salt="dead")
    assert same_tokens(got, pair.stock.complete(prompt, cache_salt="local"))
    assert counted.totals()["offered"] == 0
    assert pair.decode.snapshot()["decode"]["decisions"]["no_healthy_worker"] >= 1


def test_a_restarted_prefill_worker_is_used_again(pair: Fleet) -> None:
    pair.restart_prefill()
    pair.decode.when(lambda v: any(w["healthy"] for w in v["prefill_workers"]["workers"].values()), within_s=60)
    assert_offloaded_as_local(pair, prompt_of(700, seed=9), cache_salt="restarted")


def test_a_prefill_worker_that_drains_is_not_asked_until_it_takes_prompts_again(pair: Fleet) -> None:
    prompt = prompt_of(700, seed=11)
    answer = pair.prefill.http.post(f"{pair.prefill.url}/disagg/drain")
    assert (answer.status_code, answer.json()) == (200, {"draining": True})
    try:
        before = pair.decode.when(lambda v: "draining" in worker_states(v))["decode"]["decisions"].get("draining", 0)
        counted = Offloads(pair.decode)
        got = pair.decode.complete(prompt, cache_salt="drains")
        assert same_tokens(got, pair.stock.complete(prompt, cache_salt="local"))
        assert counted.totals()["offered"] == 0
        assert pair.decode.snapshot()["decode"]["decisions"]["draining"] == before + 1
        assert pair.prefill.http.get(f"{pair.prefill.url}/disagg/status").json()["draining"]
    finally:
        answer = pair.prefill.http.delete(f"{pair.prefill.url}/disagg/drain")
    assert (answer.status_code, answer.json()) == (200, {"draining": False})
    pair.decode.when(lambda v: "healthy" in worker_states(v))
    assert_offloaded_as_local(pair, prompt_of(700, seed=12), cache_salt="takes prompts again")


def test_a_prefill_worker_that_is_told_to_leave_ends_what_it_has_begun(pair: Fleet) -> None:
    """SIGTERM to its first process alone, as Kubernetes sends it. The last of this prefill engine."""
    prompt = prompt_of(3_500, seed=13)
    local = pair.stock.complete(prompt, cache_salt="local")
    counted = Offloads(pair.decode)
    with ThreadPoolExecutor(1) as pool:
        with stopped_models(pair.prefill):
            future = pool.submit(pair.decode.complete, prompt, cache_salt="leaves")
            pair.prefill.when(lambda v: any(ticket["started_s"] for ticket in v["prefill"]["open"]))
            os.kill(pair.prefill.pid, signal.SIGTERM)
            pair.decode.when(lambda v: "draining" in worker_states(v))
        got = future.result(timeout=120)
    assert same_tokens(got, local)
    totals = counted.totals()
    assert (totals["offered"], totals["landed"], totals["fallbacks"]) == (1, 1, 0)
    pair.decode.when(lambda _: not is_alive(pair.prefill), within_s=120)


def test_a_worker_with_other_weights_is_refused_once_and_never_used(pair: Fleet) -> None:
    """The same config.json, another random seed: without a digest their KV would mix silently."""
    workers = pair.decode.snapshot()["prefill_workers"]["workers"]
    (other_side,) = {int(name.rsplit(":", 1)[1]) for name in workers} - {pair.prefill.side_port}
    url = next(w["url"] for name, w in workers.items() if name.endswith(f":{other_side}"))
    stock_local = pair.stock.complete(prompt_of(900, seed=10), cache_salt="local")
    pair.stock_life.close()  # at most three engines at a time
    end_tree(pair.prefill, signal.SIGTERM)
    pair.prefill_life.close()
    plan = type(pair.prefill_plan)(
        "other-seed", tiny(seed=1), int(url.rsplit(":", 1)[1]), 0, settings("prefill", other_side)
    )
    pair.prefill = plan.start(pair.prefill_life, pair.folder)
    view = pair.decode.when(lambda v: v["prefill_workers"]["counters"].get("rejected_weights_digest", 0) > 0)
    assert view["prefill_workers"]["counters"]["rejected_weights_digest"] == 1
    counted = Offloads(pair.decode)
    got = pair.decode.complete(prompt_of(900, seed=10), cache_salt="other-seed")
    assert same_tokens(got, stock_local)
    assert counted.totals()["offered"] == 0
    log = (pair.folder / "decode.log").read_text()
    (line,) = [part for part in log.splitlines() if "weights_digest differs" in part]
    assert "ours " in line
    assert "theirs " in line
