"""Engines that are unusual, and unusual moments of engines: adapters, data parallelism, pauses, preemption, leaving.

Two starts: a prefill engine with a small cache, larger blocks and short leases; a decode engine of two data-parallel
ranks and two API servers. Ordered: the prefill engine leaves at the end.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from adapters import tiny_adapter
from e2e.client import REQUEST_S, Answer, Engine, at_once, same_tokens
from e2e.conftest import TINY_TOKEN_BYTES, TRANSFER, Plan, is_quiet, settings, settle
from e2e.offloads import Offloads, prompt_of
from e2e.running import end_running_fleet
from engine_processes import is_alive, slowed
from engines import free_port, vllm_env
from models import tiny
from sequential_proxy import SequentialProxy

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

HOLD_S = 2.0
P_BLOCKS, P_BLOCK = 66, 64  # one prompt of the longest kind at a time
BIND = "VLLM_CPU_OMP_THREADS_BIND"
DEV_MODE = {"VLLM_SERVER_DEV_MODE": "1"}  # /reset_prefix_cache, /pause, /resume


@dataclass
class Unusual:
    """The prefill engine, and each rank of the decode engine as an engine."""

    prefill: Engine
    ranks: tuple[Engine, Engine]
    folder: Path

    @property
    def decode(self) -> Engine:
        return self.ranks[0]

    def local(self, prompt: list[int], **params: Any) -> Answer:
        """What the prefill engine answers when it is asked directly, as an ordinary engine."""
        return self.prefill.complete(prompt, cache_salt="local", **params)


def adapters(folder: Path, *, clash_seed: int) -> tuple[str, ...]:
    """Flags of an engine with two adapters: ``same`` is the same on every engine, ``clash`` is not."""
    same, clash = tiny_adapter(folder / "same", seed=1), tiny_adapter(folder / "clash", seed=clash_seed)
    return ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"same={same}", f"clash={clash}")


@pytest.fixture(scope="module")
def unusual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unusual]:
    end_running_fleet()
    folder = tmp_path_factory.mktemp("unusual")
    p_port, p_side, d_port = free_port(), free_port(), free_port()
    d_side = free_port()
    p_settings = settings("prefill", p_side, transfer={**TRANSFER, "hold_s": HOLD_S})
    small = ("--block-size", str(P_BLOCK), "--num-gpu-blocks-override", str(P_BLOCKS))
    p_flags = (*small, "--max-num-batched-tokens", "128", *adapters(folder / "p", clash_seed=2))
    p_plan = Plan("prefill", tiny(), p_port, 0, p_settings, p_flags, DEV_MODE)
    workers = [{"url": f"http://127.0.0.1:{p_port}", "side_channel": f"127.0.0.1:{p_side}"}]
    d_flags = ("--data-parallel-size", "2", "--api-server-count", "2", *adapters(folder / "d", clash_seed=3))
    d_env = {**DEV_MODE, BIND: "|".join(vllm_env(core=core)[BIND] for core in range(2))}  # a core for each rank
    d_plan = Plan("decode", tiny(), d_port, 1, settings("decode", d_side, prefill_workers=workers), d_flags, d_env)
    with ExitStack() as stack:
        starts = [lambda plan=plan: plan.start(stack, folder) for plan in (p_plan, d_plan)]
        prefill, decode = at_once(starts)
        ranks = []
        for rank in range(2):
            http = httpx.Client(timeout=REQUEST_S, headers={"X-data-parallel-rank": str(rank)})
            stack.callback(http.close)
            ranks.append(replace(decode, side_port=d_side + rank, http=http))
        made = Unusual(prefill, (ranks[0], ranks[1]), folder)
        for engine in made.ranks:
            engine.when(lambda v: any(w["healthy"] for w in v["prefill_workers"]["workers"].values()))
            engine.complete(range(1_000, 1_300), cache_salt="warm-up")
        yield made


@pytest.fixture
def pair(unusual: Unusual) -> Iterator[Unusual]:
    """Afterwards nothing may have leaked, on any rank."""
    yield unusual
    for engine in unusual.ranks:
        assert settle(engine)["decode"]["tracked_requests"] == 0
    if is_alive(unusual.prefill):
        settle(unusual.prefill)


def assert_offloaded_as_local(pair: Unusual, engine: Engine, prompt: list[int], **params: Any) -> dict[str, int]:
    counted = Offloads(engine)
    got = engine.complete(prompt, cache_salt="offloaded", **params)
    totals = counted.totals()
    assert (totals["offered"], totals["landed"], totals["fallbacks"]) == (1, 1, 0)
    assert same_tokens(got, pair.local(prompt, **params))
    return totals


@pytest.mark.parametrize("rank", [0, 1])
def test_every_data_parallel_rank_offloads_over_a_side_channel_and_regions_of_its_own(pair: Unusual, rank: int) -> None:
    engine, other = pair.ranks[rank], pair.ranks[1 - rank]
    untouched = Offloads(other)
    assert_offloaded_as_local(pair, engine, prompt_of(900, seed=10 + rank))
    assert untouched.totals()["offered"] == 0
    ours, theirs = engine.snapshot(), other.snapshot()
    assert ours["engine"] != theirs["engine"]
    assert {ours["engine"], theirs["engine"]} <= set(pair.prefill.snapshot()["prefill"]["peers"])


def test_both_ranks_at_once_are_right(pair: Unusual) -> None:
    prompts = [prompt_of(300 + 40 * at, seed=20) for at in range(8)]
    calls = [
        lambda p=p, at=at: pair.ranks[at % 2].complete(p, cache_salt="both", max_tokens=4)
        for at, p in enumerate(prompts)
    ]
    answers = at_once(calls)
    for prompt, got in zip(prompts, answers, strict=True):
        local = pair.local(prompt, max_tokens=4)
        assert got.tokens[0] == local.tokens[0] or local.top2_gaps[0] < 2e-2


@pytest.mark.parametrize("tokens", [P_BLOCK - 1, P_BLOCK, P_BLOCK + 1, 1_000])
def test_block_sizes_may_differ(pair: Unusual, tokens: int) -> None:
    totals = assert_offloaded_as_local(pair, pair.decode, prompt_of(tokens, seed=30))
    assert totals["raw_bytes"] == (tokens - 1) * TINY_TOKEN_BYTES


def test_an_adapter_of_one_name_and_one_digest_is_used(pair: Unusual) -> None:
    prompt = prompt_of(500, seed=40)
    assert_offloaded_as_local(pair, pair.decode, prompt, model="same")
    assert pair.local(prompt, model="same").tokens != pair.local(prompt).tokens


@pytest.mark.parametrize("seed", range(41, 45))
def test_another_adapter_under_the_same_name_is_not_used(pair: Unusual, seed: int) -> None:
    prompt = prompt_of(500, seed=seed)
    counted = Offloads(pair.decode)
    before = pair.decode.snapshot()["decode"]["fallbacks"].get("adapter_differs", 0)
    got = pair.decode.complete(prompt, cache_salt="clash", model="clash")
    totals = counted.totals()
    assert (totals["landed"], totals["fallbacks"], totals["wire_bytes"]) == (0, 1, 0)
    assert pair.decode.snapshot()["decode"]["fallbacks"]["adapter_differs"] == before + 1
    assert same_tokens(got, pair.decode.complete(prompt, cache_salt="again", model="clash", prompt_logprobs=1))


def test_a_lease_that_ended_costs_a_local_prefill(pair: Unusual) -> None:
    prompt = prompt_of(400, seed=50)
    counted = Offloads(pair.decode)

    def too_late(params: Any) -> Any:
        pair.prefill.when(is_quiet, within_s=20 * HOLD_S)
        return params

    with SequentialProxy(pair.prefill.url, pair.decode.url, between=too_late) as proxy:
        routed = Engine(proxy.url, pair.decode.model)
        got = routed.complete(prompt, cache_salt="lease")
    assert same_tokens(got, pair.local(prompt))
    refused = sum(e.snapshot()["decode"]["fallbacks"].get("refused_hold_expired", 0) for e in pair.ranks)
    assert refused == 1
    assert counted.totals()["wire_bytes"] == 0


def test_a_prefix_cache_reset_beside_a_transfer_harms_neither(pair: Unusual) -> None:
    prompt = prompt_of(2_000, seed=60)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(pair.decode.complete, prompt, cache_salt="reset")
        while not future.done():
            for engine in (pair.decode, pair.prefill):
                answer = engine.http.post(f"{engine.url}/reset_prefix_cache")
                assert answer.status_code == 200
                assert set(answer.json()) == {"success"}
        got = future.result()
    assert same_tokens(got, pair.local(prompt))


def test_a_prompt_whose_prefill_is_preempted_arrives_all_the_same(pair: Unusual) -> None:
    """Frozen in the middle of its prefill, robbed of its blocks, and let go."""
    for attempt in range(8):
        before = pair.prefill.snapshot()["prefill"]["totals"].get("preempted", 0)
        prompt = prompt_of(2_500, seed=70 + attempt)
        counted = Offloads(pair.decode)
        with ThreadPoolExecutor(1) as pool:
            with slowed(pair.prefill):
                future = pool.submit(pair.decode.complete, prompt, cache_salt="preempted", max_tokens=4)
                pair.prefill.when(lambda v: any(t["started_s"] for t in v["prefill"]["open"]), every_s=0.01)
                post(pair.prefill, "/pause?mode=keep")  # and clears the cache: what runs is preempted
            post(pair.prefill, "/resume")
            got = future.result(timeout=120)
        assert same_tokens(got, pair.local(prompt, max_tokens=4))
        totals = counted.totals()
        assert (totals["landed"], totals["fallbacks"]) == (1, 0)
        assert totals["raw_bytes"] == 2_499 * TINY_TOKEN_BYTES, "nothing was sent twice"
        if pair.prefill.snapshot()["prefill"]["totals"].get("preempted", 0) > before:
            return
    raise AssertionError("no prefill was interrupted in eight attempts")


def post(engine: Engine, path: str) -> None:
    answer = engine.http.post(f"{engine.url}{path}")
    assert answer.status_code == 200, answer.text


def test_a_paused_decode_engine_goes_on_when_resumed(pair: Unusual) -> None:
    prompt = prompt_of(2_000, seed=80)
    with ThreadPoolExecutor(1) as pool:
        with slowed(pair.prefill):
            future = pool.submit(pair.decode.complete, prompt, cache_salt="paused")
            pair.prefill.when(lambda v: bool(v["prefill"]["open"]), every_s=0.01)
            post(pair.decode, "/pause?mode=keep&clear_cache=false")  # vLLM clears no cache that requests wait for
        post(pair.decode, "/resume")
        got = future.result(timeout=120)
    assert same_tokens(got, pair.local(prompt))


def several_long(seed: int) -> list[list[int]]:
    return [prompt_of(2_300, seed=seed + at) for at in range(4)]


def answers_while(pair: Unusual, prompts: list[list[int]], action: Any) -> list[Answer]:
    """Offload all at once, more than P can compute side by side, and act while its engine has all of them before it."""

    def all_came(view: dict[str, Any]) -> bool:  # not only their offers: the prompts themselves, over HTTP
        return sum(bool(ticket["request_id"]) for ticket in view["prefill"]["open"]) == len(prompts)

    with ThreadPoolExecutor(len(prompts)) as pool:
        with slowed(pair.prefill):
            futures = [pool.submit(pair.decode.complete, p, cache_salt="several", max_tokens=4) for p in prompts]
            pair.prefill.when(all_came, every_s=0.02)
            action()
        return [future.result(timeout=240) for future in futures]


def assert_right(pair: Unusual, prompts: list[list[int]], answers: list[Answer]) -> None:
    for prompt, got in zip(prompts, answers, strict=True):
        local = pair.decode.complete(prompt, cache_salt="check", max_tokens=4, prompt_logprobs=1)
        assert got.tokens[0] == local.tokens[0] or local.top2_gaps[0] < 2e-2


def test_a_paused_prefill_engine_hands_its_prompts_back(pair: Unusual) -> None:
    prompts = several_long(seed=90)
    counted = Offloads(pair.decode)
    answers = answers_while(pair, prompts, lambda: post(pair.prefill, "/pause?mode=abort"))
    post(pair.prefill, "/resume")
    assert counted.totals()["fallbacks"] == len(prompts)
    assert pair.decode.snapshot()["decode"]["fallbacks"]["prefill_aborted"] == len(prompts)
    assert_right(pair, prompts, answers)


@pytest.mark.parametrize(("mode", "seed"), [("abort", 110), ("keep", 120)])
def test_what_comes_to_a_paused_prefill_engine_is_not_kept_waiting(pair: Unusual, mode: str, seed: int) -> None:
    """It says nothing and makes no step; before, a prompt waited for the start time-out, and each one after it."""

    def worker() -> dict[str, Any]:
        (seen,) = pair.decode.snapshot()["prefill_workers"]["workers"].values()
        return dict(seen)

    first, second, third = (prompt_of(2_300, seed=seed + at) for at in range(3))
    handed_back = pair.decode.snapshot()["decode"]["fallbacks"].get("prefill_paused", 0)
    counted = Offloads(pair.decode)
    post(pair.prefill, f"/pause?mode={mode}")
    answers = [pair.decode.complete(p, cache_salt="standing", max_tokens=4) for p in (first, second)]
    assert counted.totals()["offered"] == 1, "the second is not offered to it any more"
    assert pair.decode.snapshot()["decode"]["fallbacks"]["prefill_paused"] == handed_back + 1
    assert (worker()["state"], worker()["failures"]) == ("draining", 0)
    post(pair.prefill, "/resume")
    assert_right(pair, [first, second], answers)
    pair.decode.when(lambda _: worker()["state"] == "healthy")
    assert_offloaded_as_local(pair, pair.decode, third)


def test_a_prefill_engine_that_is_told_to_leave_hands_back_and_leaves(pair: Unusual) -> None:
    prompts = several_long(seed=100)
    process = psutil.Process(pair.prefill.pid)
    counted = Offloads(pair.decode)
    answers = answers_while(pair, prompts, process.terminate)
    assert counted.totals()["fallbacks"] >= 1
    assert_right(pair, prompts, answers)
    psutil.wait_procs([process], timeout=60)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
