"""Tensor-parallel ranks: each brings its own heads, all or none of them count, and both sides may have other numbers.

Three starts: a prefill and a decode engine of two ranks each, and one of a single rank that is both. Ordered: the
decode engine leaves at the end.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from e2e.client import Answer, Engine, at_once, same_tokens
from e2e.conftest import TINY_TOKEN_BYTES, TRANSFER, Plan, is_alive, settings, settle
from e2e.offloads import Offloads, prompt_of
from e2e.running import end_running_fleet
from engines import free_port, vllm_env
from models import tiny
from sequential_proxy import SequentialProxy

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

BIND = "VLLM_CPU_OMP_THREADS_BIND"
# ranks that wait for each other spin: with five of them on few cores, everything takes as long as it takes
PATIENT: dict[str, Any] = {
    "side_channel": {"heartbeat_s": 2.0, "peer_timeout_s": 120.0},
    "transfer": {**TRANSFER, "offer_timeout_s": 60.0, "stall_timeout_s": 200.0, "start_timeout_s": 200.0},
}
FAULTY_SITE = Path(__file__).parents[1] / "faulty_site"


@dataclass
class Ranks:
    """The engines; a rank's number in ``damage`` makes that rank of P damage its next chunk."""

    prefill: Engine
    decode: Engine
    single: Engine
    damage: Path


def patient(role: str, side_port: int, **more: Any) -> dict[str, Any]:
    """Settings whose time-outs none of these tests is about."""
    made = settings(role, side_port, transfer=PATIENT["transfer"], **more)
    return made | {"side_channel": {**PATIENT["side_channel"], "port": side_port}}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    end_running_fleet()
    folder = tmp_path_factory.mktemp("ranks")
    p_port, p_side, d_port, d_side, s_port, s_side = (free_port() for _ in range(6))
    both = {BIND: "|".join(vllm_env(core=core)[BIND] for core in range(2))}
    flags = ("--tensor-parallel-size", "2")
    damage = folder / "damage"
    path = [str(FAULTY_SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    faulty = {**both, "PYTHONPATH": os.pathsep.join(path), "DISAGG_TEST_DAMAGE": str(damage)}
    p_plan = Plan("prefill", tiny(), p_port, 0, patient("prefill", p_side), flags, faulty)
    workers = [{"url": f"http://127.0.0.1:{p_port}", "side_channel": f"127.0.0.1:{p_side}"}]
    allowed = {"allowed_hosts": [f"127.0.0.1:{s_side}"]}  # nobody told D of it: a router will
    d_settings = patient("decode", d_side, prefill_workers=workers, router=allowed)
    d_plan = Plan("decode", tiny(), d_port, 1, d_settings, flags, both)
    s_plan = Plan("single", tiny(), s_port, 0, patient("both", s_side, prefill_workers=workers))
    with ExitStack() as stack:
        starts = [lambda plan=plan: plan.start(stack, folder) for plan in (p_plan, d_plan, s_plan)]
        prefill, decode, single = at_once(starts)
        for engine in (decode, single):
            engine.when(lambda v: any(w["healthy"] for w in v["prefill_workers"]["workers"].values()))
            engine.complete(range(1_000, 1_300), cache_salt="warm-up")
        yield Ranks(prefill, decode, single, damage)


@pytest.fixture
def pair(ranks: Ranks) -> Iterator[Ranks]:
    yield ranks
    if is_alive(ranks.decode):
        assert settle(ranks.decode)["decode"]["tracked_requests"] == 0
    settle(ranks.single)
    settle(ranks.prefill)


@pytest.mark.parametrize("tokens", [33, 700, 1_500])
def test_both_ranks_bring_their_heads(pair: Ranks, tokens: int) -> None:
    prompt = prompt_of(tokens, seed=200)
    counted = Offloads(pair.decode)
    got = pair.decode.complete(prompt, cache_salt="ranks")
    totals = counted.totals()
    assert (totals["offered"], totals["landed"], totals["fallbacks"]) == (1, 1, 0)
    assert totals["raw_bytes"] == (tokens - 1) * TINY_TOKEN_BYTES
    assert same_tokens(got, pair.prefill.complete(prompt, cache_salt="local"))


@pytest.mark.parametrize("tokens", [33, 1_500])
def test_two_ranks_send_to_one(pair: Ranks, tokens: int) -> None:
    prompt = prompt_of(tokens, seed=230)
    counted = Offloads(pair.single)
    got = pair.single.complete(prompt, cache_salt="two to one")
    totals = counted.totals()
    assert (totals["offered"], totals["landed"], totals["fallbacks"]) == (1, 1, 0)
    assert totals["raw_bytes"] == (tokens - 1) * TINY_TOKEN_BYTES
    assert same_tokens(got, local(pair.single, prompt))


@pytest.mark.parametrize("tokens", [33, 1_500])
def test_one_rank_sends_to_two(pair: Ranks, tokens: int) -> None:
    """By way of a router, to an engine that the decode engine's settings only allow."""
    prompt = prompt_of(tokens, seed=231)
    counted = Offloads(pair.decode)
    with SequentialProxy(pair.single.url, pair.decode.url) as proxy:
        got = Engine(proxy.url, pair.decode.model).complete(prompt, cache_salt="one to two")
    totals = counted.totals()
    assert (totals["offered"], totals["landed"], totals["fallbacks"]) == (1, 1, 0)
    assert totals["raw_bytes"] == (tokens - 1) * TINY_TOKEN_BYTES
    assert same_tokens(got, local(pair.decode, prompt))


def local(engine: Engine, prompt: list[int]) -> Answer:
    """A prompt whose logprobs are asked for is prefilled where it is."""
    return engine.complete(prompt, cache_salt="local", prompt_logprobs=1)


def test_a_chunk_of_one_rank_that_is_damaged_is_asked_for_again(pair: Ranks) -> None:
    prompt = prompt_of(900, seed=201)
    before = {rank: dict(counters) for rank, counters in pair.decode.snapshot()["decode"]["ranks"].items()}
    counted = Offloads(pair.decode)
    pair.damage.write_text("1")
    got = pair.decode.complete(prompt, cache_salt="damaged")
    assert not pair.damage.exists(), "rank 1 damaged a chunk"
    totals = counted.totals()
    assert (totals["landed"], totals["fallbacks"]) == (1, 0)
    after = settle(pair.decode)["decode"]["ranks"]
    failures = {rank: after[rank]["checksum_failures"] - before[rank]["checksum_failures"] for rank in after}
    assert failures == {"0": 0, "1": 1}
    assert same_tokens(got, pair.prefill.complete(prompt, cache_salt="local"))


def test_a_decode_engine_that_leaves_costs_prefill_nothing(pair: Ranks) -> None:
    """SIGTERM while four transfers are open; what P does for it ends, and no block stays taken."""
    prompts = [prompt_of(2_500, seed=210 + at) for at in range(4)]
    process = psutil.Process(pair.decode.pid)
    with ThreadPoolExecutor(len(prompts)) as pool:
        futures = [pool.submit(pair.decode.complete, p, cache_salt="leaves") for p in prompts]
        pair.prefill.when(lambda v: len(v["prefill"]["open"]) >= 3, every_s=0.02)
        process.terminate()
        for future in futures:
            future.exception(timeout=120)  # as vLLM ends them: an error, or an answer cut short
    psutil.wait_procs([process], timeout=60)
    settle(pair.prefill)
    prompt = prompt_of(300, seed=220)
    assert len(pair.prefill.complete(prompt, cache_salt="alone").tokens) == 16
