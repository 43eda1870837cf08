"""Tensor-parallel ranks: each brings its own heads, all or none of them count, and both sides may have other numbers.

Three starts, two engines at a time: one of two ranks that prefills for all, a decode engine of two ranks, and, when
that has left, one of a single rank.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from e2e.client import Engine, Going, same_tokens
from e2e.conftest import TINY_TOKEN_BYTES, TRANSFER, Plan, is_quiet, settings
from e2e.offloads import Offloads, prompt_of
from e2e.running import end_running_fleet
from engines import free_port, vllm_env
from models import tiny
from sequential_proxy import SequentialProxy

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

BIND = "VLLM_CPU_OMP_THREADS_BIND"
FAULTY_SITE = Path(__file__).parents[1] / "faulty_site"
TWO_RANKS = ("--tensor-parallel-size", "2")
TWO_CORES = {BIND: "|".join(vllm_env(core=core)[BIND] for core in range(2))}
# ranks that wait for each other spin: with four of them on few cores, everything takes as long as it takes
PATIENT: dict[str, Any] = {
    "side_channel": {"heartbeat_s": 2.0, "peer_timeout_s": 120.0},
    "transfer": {**TRANSFER, "offer_timeout_s": 60.0, "stall_timeout_s": 200.0, "start_timeout_s": 200.0},
}


def patient(role: str, side_port: int, **more: Any) -> dict[str, Any]:
    """Settings whose time-outs none of these tests is about."""
    made = settings(role, side_port, transfer=PATIENT["transfer"], **more)
    return made | {"side_channel": {**PATIENT["side_channel"], "port": side_port}}


@dataclass
class Prefill:
    """The engine of two ranks that all others use, and what is needed to start those.

    A rank's number in ``damage`` makes that rank damage its next chunk.
    """

    engine: Engine
    folder: Path
    damage: Path
    single_side: int

    def start(self, stack: ExitStack, name: str, role: str, side_port: int, core: int, **how: Any) -> Engine:
        """Start an engine that has this one as its only prefill worker."""
        side = f"127.0.0.1:{self.engine.side_port}"
        workers = [{"url": self.engine.url, "side_channel": side}]
        plan = Plan(name, tiny(), free_port(), core, patient(role, side_port, prefill_workers=workers), **how)
        engine = plan.start(stack, self.folder)
        engine.when(lambda v: any(w["healthy"] for w in v["prefill_workers"]["workers"].values()), within_s=120)
        engine.complete(range(1_000, 1_300), cache_salt="warm-up")
        return engine


@pytest.fixture(scope="module")
def prefill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefill]:
    end_running_fleet()
    folder = tmp_path_factory.mktemp("ranks")
    single_side, damage = free_port(), folder / "damage"
    path = [str(FAULTY_SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**TWO_CORES, "PYTHONPATH": os.pathsep.join(path), "DISAGG_TEST_DAMAGE": str(damage)}
    allowed = {"allowed_hosts": [f"127.0.0.1:{single_side}"]}  # nobody told it of that one: a router will
    plan = Plan("prefill", tiny(), free_port(), 0, patient("both", free_port(), router=allowed), TWO_RANKS, env)
    with ExitStack() as stack:
        engine = plan.start(stack, folder)
        # vLLM compiles a piece of its embedding with the first prompt of several ranks: not while others spin
        engine.complete(range(2_000, 2_300))
        yield Prefill(engine, folder, damage, single_side)


@pytest.fixture(scope="module")
def decode(prefill: Prefill) -> Iterator[Engine]:
    with ExitStack() as stack:
        yield prefill.start(stack, "decode", "decode", free_port(), 1, extra=TWO_RANKS, env=TWO_CORES)


@pytest.fixture(scope="module")
def single(prefill: Prefill) -> Iterator[Engine]:
    with ExitStack() as stack:
        yield prefill.start(stack, "single", "both", prefill.single_side, 1)


def settled(engine: Engine) -> dict[str, Any]:
    return engine.when(is_quiet, within_s=120)


def assert_offloaded(engine: Engine, prompt: list[int], ask: Engine | None = None) -> None:
    """The prompt's KV comes over the wire to ``engine``, whole, and gives what its own prefill gives."""
    counted = Offloads(engine)
    got = (ask or engine).complete(prompt, cache_salt="offloaded")
    totals = counted.totals()
    assert (totals["offered"], totals["landed"], totals["fallbacks"]) == (1, 1, 0)
    assert totals["raw_bytes"] == (len(prompt) - 1) * TINY_TOKEN_BYTES
    local = engine.complete(prompt, cache_salt="local", prompt_logprobs=1)
    assert same_tokens(got, local)
    settled(engine)


@pytest.mark.parametrize("tokens", [33, 700, 1_500])
def test_both_ranks_bring_their_heads(prefill: Prefill, decode: Engine, tokens: int) -> None:
    assert_offloaded(decode, prompt_of(tokens, seed=200))
    settled(prefill.engine)


def test_a_chunk_of_one_rank_that_is_damaged_is_asked_for_again(prefill: Prefill, decode: Engine) -> None:
    before = {rank: dict(counters) for rank, counters in decode.snapshot()["decode"]["ranks"].items()}
    prefill.damage.write_text("1")
    assert_offloaded(decode, prompt_of(900, seed=201))
    assert not prefill.damage.exists(), "rank 1 damaged a chunk"
    after = settled(decode)["decode"]["ranks"]
    failures = {rank: after[rank]["checksum_failures"] - before[rank]["checksum_failures"] for rank in after}
    assert failures == {"0": 0, "1": 1}


def test_a_decode_engine_that_leaves_costs_prefill_nothing(prefill: Prefill, decode: Engine) -> None:
    """SIGTERM while transfers are open; what P does for it ends, and no block stays taken."""
    process = psutil.Process(decode.pid)
    going = [Going(decode, prompt_of(2_500, seed=210 + at), "leaves") for at in range(4)]
    prefill.engine.when(lambda v: len(v["prefill"]["open"]) >= 3, every_s=0.02, within_s=120)
    process.terminate()
    prefill.engine.when(lambda v: not v["prefill"]["open"], within_s=120)
    for client in going:  # vLLM's API server waits for its connections to close, with its engine gone
        client.goes_away()
    psutil.wait_procs([process], timeout=120)
    settled(prefill.engine)
    assert len(prefill.engine.complete(prompt_of(300, seed=220), cache_salt="alone").tokens) == 16


@pytest.mark.parametrize("tokens", [33, 1_500])
def test_two_ranks_send_to_one(prefill: Prefill, single: Engine, tokens: int) -> None:
    assert_offloaded(single, prompt_of(tokens, seed=230))
    settled(prefill.engine)


@pytest.mark.parametrize("tokens", [33, 1_500])
def test_one_rank_sends_to_two(prefill: Prefill, single: Engine, tokens: int) -> None:
    """By way of a router, to an engine whose settings only allow to go there."""
    with SequentialProxy(single.url, prefill.engine.url) as proxy:
        assert_offloaded(prefill.engine, prompt_of(tokens, seed=231), ask=Engine(proxy.url, prefill.engine.model))
    settled(single)
