"""Prefixes from LMCache, alone and together with a prefill worker: real servers, real engines.

Two engines, each with its own `lmcache server`, whose second tiers share one folder. Ordered: the later tests stop,
kill and replace servers. ``g`` is what D has in its own prefix cache, ``l`` what LMCache loads, ``r`` what P sends.
"""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from e2e.client import Engine, Going, at_once, same_tokens
from e2e.conftest import TINY_TOKEN_BYTES, Plan, is_quiet, settings
from e2e.offloads import prompt_of
from e2e.predictions import TOP, assert_predicts_the_same, compare, texts_of, top_logprobs
from e2e.reuse import Counted, Reuse, cache, held_still, is_stored
from e2e.running import end_running_fleet
from engine_processes import slowed, stopped_models
from engines import EngineFailed, free_port
from lmcache_servers import CHUNK, LMCacheServer, holds_nothing_locked
from models import smollm2, tiny
from sequential_proxy import SequentialProxy

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

DECODE_BLOCKS = 200  # 6,400 tokens
FORGETS = {"VLLM_SERVER_DEV_MODE": "1"}  # for /reset_prefix_cache


@pytest.fixture(scope="module")
def reuse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reuse]:
    end_running_fleet()
    folder = tmp_path_factory.mktemp("lmcache")
    p_port, p_side, d_port, d_side = (free_port() for _ in range(4))
    with ExitStack() as stack:
        store_p, store_d = LMCacheServer("p", folder), LMCacheServer("d", folder)
        stack.callback(store_p.stop)
        stack.callback(store_d.stop)
        at_once([lambda: store_p.start(l2=folder / "l2"), lambda: store_d.start(l2=folder / "l2")])
        p_plan = Plan("prefill", tiny(), p_port, 0, settings("prefill", p_side, cache=cache(store_p)), env=FORGETS)
        worker = {"url": f"http://127.0.0.1:{p_port}", "side_channel": f"127.0.0.1:{p_side}"}
        d_plan = Plan(
            "decode",
            tiny(),
            d_port,
            1,
            settings("decode", d_side, prefill_workers=[worker], cache=cache(store_d)),
            extra=("--num-gpu-blocks-override", str(DECODE_BLOCKS)),
            env=FORGETS,
        )
        prefill, decode = at_once([lambda plan=plan: plan.start(stack, folder) for plan in (p_plan, d_plan)])
        decode.when(has_a_worker)
        assert decode.snapshot()["lmcache"]["inactive_reason"] == ""
        yield Reuse(prefill, decode, store_p, store_d, folder)


def is_open(state: str) -> Callable[[dict[str, Any]], bool]:
    """A transfer of D is in this state."""
    return lambda view: any(transfer["state"] == state for transfer in view["decode"]["open"])


def asks_lmcache_nothing(view: dict[str, Any]) -> bool:
    """No look-up is on its way, and no request is kept for one: a server that hung answers a while later."""
    return not view["lmcache"]["tracked_requests"] and not view["lmcache"]["unanswered_lookups"]


def has_a_worker(view: dict[str, Any]) -> bool:
    return any(worker["healthy"] for worker in view["prefill_workers"]["workers"].values())


@pytest.fixture
def shared(reuse: Reuse) -> Iterator[Reuse]:
    """The engines; afterwards nothing may have leaked: blocks, transfers, look-ups, locks."""
    yield reuse
    for engine in (reuse.decode, reuse.prefill):
        engine.when(lambda v: is_quiet(v) and asks_lmcache_nothing(v))
    assert reuse.decode.snapshot()["decode"]["tracked_requests"] == 0
    if reuse.store_d.runs:
        reuse.store_d.when(holds_nothing_locked)
    reuse.store_p.when(holds_nothing_locked)


def test_the_second_request_loads_the_whole_chunks_of_its_prefix_and_says_the_same(shared: Reuse) -> None:
    prompt = prompt_of(600, seed=1)
    local = shared.local(prompt)
    counted = shared.count()
    cold = shared.decode.complete(prompt, cache_salt="a")
    assert counted("offered", "landed", "store_hit_tokens", "wire_tokens") == (1, 1, 0, 599)
    shared.forget()
    counted = shared.count()
    warm = shared.decode.complete(prompt, cache_salt="a")
    # nothing of this was computed on D: LMCache has it from the wire
    assert counted("store_hit_tokens", "wire_tokens", "offered") == (600 // CHUNK * CHUNK, 0, 0)
    assert counted("source_host", "source_p2p", "source_local_compute") == (576, 0, 24)
    assert same_tokens(warm, local)
    assert same_tokens(cold, local)
    assert warm.top2_gaps == pytest.approx(local.top2_gaps, abs=1e-3)


def test_a_prefix_from_lmcache_and_the_rest_from_the_worker_are_one_load(shared: Reuse) -> None:
    prompt = prompt_of(800, seed=2)
    shared.decode.complete(prompt[:300], cache_salt="b")
    shared.forget()
    counted = shared.count()
    got = shared.decode.complete(prompt, cache_salt="b")
    assert counted("store_hit_tokens", "wire_tokens", "landed", "failed_loads") == (256, 543, 1, 0)
    assert counted("source_host", "source_p2p", "source_local_compute") == (256, 543, 1)
    assert counted("raw_bytes") == (543 * TINY_TOKEN_BYTES,)
    row = shared.decode.snapshot()["decode"]["recent"][-1]
    assert (row["first_token"], row["end_token"], row["lmcache_tokens"]) == (256, 799, 256)
    assert same_tokens(got, shared.local(prompt))


def test_the_engines_own_prefix_lmcache_and_the_worker_each_give_their_part(shared: Reuse) -> None:
    prompt = prompt_of(900, seed=3)
    shared.decode.complete(prompt[:500], cache_salt="c")  # LMCache: 448
    shared.forget()
    shared.decode.complete(prompt[:100], cache_salt="c")  # its own cache now: 96, or a whole block less
    counted = shared.count()
    got = shared.decode.complete(prompt, cache_salt="c")
    cached, loaded, received = counted("device_hit_tokens", "store_hit_tokens", "wire_tokens")
    assert cached in (64, 96)
    assert (cached + loaded, received) == (448, 900 - 1 - 448)
    assert same_tokens(got, shared.local(prompt))


def test_what_the_worker_computed_for_others_is_found_by_an_engine_that_never_saw_it(shared: Reuse) -> None:
    prompt = prompt_of(640 + 20, seed=4)
    local = shared.prefill.complete(prompt, cache_salt="d")
    is_stored(shared.prefill, shared.store_p)
    counted = shared.count()
    got = shared.decode.complete(prompt, cache_salt="d")
    assert counted("store_hit_tokens", "wire_tokens", "offered") == (640, 0, 0)
    assert same_tokens(got, local)


def test_another_salt_finds_nothing(shared: Reuse) -> None:
    prompt = prompt_of(600, seed=1)
    shared.decode.complete(prompt, cache_salt="a")
    shared.forget()
    for salt in ("another", "disagg-lora:1:x:a"):
        counted = shared.count()
        shared.decode.complete(prompt, cache_salt=salt)
        assert counted("store_hit_tokens", "wire_tokens") == (0, 599)


def test_a_prompt_that_lmcache_has_whole_asks_nobody(shared: Reuse) -> None:
    prompt = prompt_of(10 * CHUNK, seed=5)
    shared.decode.complete(prompt, cache_salt="full")
    shared.forget()
    counted = shared.count()
    got = shared.decode.complete(prompt, cache_salt="full")
    assert counted("store_hit_tokens", "offered", "source_host") == (639, 0, 639)
    assert same_tokens(got, shared.local(prompt))
    assert shared.decode.snapshot()["decode"]["decisions"]["prefix_held"] >= 1


@pytest.mark.parametrize("tokens", [5 * CHUNK, 800])
def test_of_what_a_router_had_prefilled_only_what_lmcache_has_not_is_fetched(shared: Reuse, tokens: int) -> None:
    prompt = prompt_of(tokens, seed=13)
    salt = f"routed-{tokens}"
    shared.decode.complete(prompt[: 5 * CHUNK], cache_salt=salt)
    shared.forget()
    before = shared.prefill.when(is_quiet)["prefill"]["drops"].get("prefix_held", 0)
    counted = shared.count()
    with SequentialProxy(shared.prefill.url, shared.decode.url) as router:
        got = Engine(router.url, shared.decode.model).complete(prompt, cache_salt=salt)
    whole = tokens == 5 * CHUNK
    loaded, received, moved_bytes, offers = counted("store_hit_tokens", "wire_tokens", "raw_bytes", "offered")
    assert loaded + received == tokens - 1
    assert loaded >= 5 * CHUNK - 1, "or more: what P has just stored is in the folder that both servers share"
    assert moved_bytes == received * TINY_TOKEN_BYTES
    assert offers == (0 if whole else 1)
    drops = shared.prefill.when(is_quiet)["prefill"]["drops"]
    assert "hold_expired" not in drops
    assert drops.get("prefix_held", 0) - before == whole, "P lets go of it at once, long before its lease ends"
    assert same_tokens(got, shared.local(prompt))


@pytest.mark.parametrize("state", ["found", "loading"])
def test_a_client_that_goes_away_leaves_no_lock_at_lmcache(shared: Reuse, state: str) -> None:
    prompt = prompt_of(3_000, seed=6)
    salt = f"gone-{state}"
    shared.decode.complete(prompt[:600], cache_salt=salt)
    shared.forget()
    with (
        held_still(shared.prefill) if state == "found" else slowed(shared.prefill)
    ):  # "found": nobody answers the offer
        going = Going(shared.decode, prompt, salt)
        shared.decode.when(is_open("offered" if state == "found" else "ready"), every_s=0.02)
        going.goes_away()
    shared.decode.when(has_a_worker)


def test_when_the_worker_falls_silent_only_its_part_is_computed_again(shared: Reuse) -> None:
    prompt = prompt_of(3_000, seed=7)
    shared.decode.complete(prompt[:1_000], cache_salt="silent")
    shared.forget()
    local = shared.local(prompt)
    counted = shared.count()
    with ThreadPoolExecutor(1) as pool, stopped_models(shared.prefill):  # it answers, and computes nothing
        future = pool.submit(shared.decode.complete, prompt, cache_salt="silent")
        shared.decode.when(is_open("ready"), every_s=0.02)
        with held_still(shared.prefill):
            got = future.result(timeout=120)
    assert same_tokens(got, local)
    assert counted("store_hit_tokens", "failed_loads") == (960, 0)
    shared.decode.when(has_a_worker)


def test_preempted_requests_with_both_loads_say_what_they_would_have_said(shared: Reuse) -> None:
    prompts = [prompt_of(1_400, seed=20 + number) for number in range(4)]
    for number, prompt in enumerate(prompts):
        shared.decode.complete(prompt[:700], cache_salt=f"many-{number}", max_tokens=1)
    shared.forget()
    local = [shared.local(prompt, max_tokens=800) for prompt in prompts]
    counted = shared.count()
    got = at_once(
        [
            lambda n=n, p=p: shared.decode.complete(p, cache_salt=f"many-{n}", max_tokens=800)
            for n, p in enumerate(prompts)
        ]
    )
    assert all(same_tokens(ours, theirs) for ours, theirs in zip(got, local, strict=True))
    assert counted("store_hit_tokens")[0] >= 4 * 640
    metrics = shared.decode.http.get(f"{shared.decode.url}/metrics").text
    preemptions = [line for line in metrics.splitlines() if line.startswith("vllm:num_preemptions_total")]
    assert float(preemptions[0].rsplit(" ", 1)[1]) >= 1, "four prompts and their texts are more than D has room for"
    tiers = [line for line in metrics.splitlines() if line.startswith("disagg_prefix_tokens_total{")]
    assert [line for line in tiers if 'tier="lmcache"' in line and float(line.rsplit(" ", 1)[1]) >= 4 * 640], tiers
    assert [
        line for line in metrics.splitlines() if line.startswith("disagg_lmcache_active{") and line.endswith(" 1.0")
    ]


def test_a_server_that_does_not_answer_costs_its_deadline_and_its_late_answer_is_given_back(shared: Reuse) -> None:
    prompt = prompt_of(700, seed=8)
    shared.decode.complete(prompt, cache_salt="late")
    shared.forget()
    local = shared.local(prompt)
    counted = shared.count()
    with shared.store_d.hanging():
        got = shared.decode.complete(prompt, cache_salt="late")
    assert same_tokens(got, local)
    assert counted("store_hit_tokens") == (0,)


def test_a_server_that_dies_while_a_request_waits_for_both_loads_costs_its_tokens(shared: Reuse) -> None:
    prompt = prompt_of(1_300, seed=9)
    local = shared.local(prompt)
    shared.decode.complete(prompt[:700], cache_salt="killed")
    shared.forget()
    counted = shared.count()
    with ThreadPoolExecutor(1) as pool:
        with held_still(shared.prefill):  # nobody answers the offer: LMCache has answered, and is not asked to load yet
            future = pool.submit(shared.decode.complete, prompt, cache_salt="killed")
            shared.decode.when(is_open("offered"), every_s=0.02)
            os.killpg(shared.store_d.pid, signal.SIGKILL)
        got = future.result(timeout=120)
    assert same_tokens(got, local)
    assert counted("store_hit_tokens", "failed_loads") == (640, 1)
    shared.decode.when(has_a_worker)
    shared.store_d.stop()


def test_the_worker_takes_a_prefix_from_its_own_lmcache_and_sends_it_on(shared: Reuse) -> None:
    prompt = prompt_of(900, seed=12)
    local = shared.prefill.complete(prompt, cache_salt="of P")
    is_stored(shared.prefill, shared.store_p)
    shared.forget(shared.prefill)
    on_d, on_p = shared.count(), Counted(shared.prefill)
    got = shared.decode.complete(prompt, cache_salt="of P")  # whose own server has died
    assert on_d("store_hit_tokens", "wire_tokens", "landed") == (0, 899, 1)
    assert on_p("store_hit_tokens", "source_host") == (896, 896)
    assert same_tokens(got, local)


def start_again(shared: Reuse, *, salt: str, **how: Any) -> None:
    """Start D's server, which keeps 80 chunks, and wait until the engine uses it: it notices by its heartbeat."""
    shared.store_d.start(l1_gb=0.02, **how)
    prompt = prompt_of(300, seed=10)
    for _ in range(300):
        shared.decode.complete(prompt, cache_salt=salt)
        shared.forget()
        counted = shared.count()
        shared.decode.complete(prompt, cache_salt=salt)
        if counted("store_hit_tokens") == (256,):
            return
        Event().wait(0.2)
    raise AssertionError("no hits after the server came back")


def test_a_server_that_comes_back_empty_and_small_is_used_again(shared: Reuse) -> None:
    start_again(shared, salt="again", l2=shared.folder / "small")


def test_while_chunks_are_evicted_texts_stay_right(shared: Reuse) -> None:
    prompts = [prompt_of(1_500, seed=30 + number) for number in range(6)]  # 138 chunks, where 80 fit
    local = [shared.local(prompt, max_tokens=4) for prompt in prompts]
    for _ in range(2):
        for number, prompt in enumerate(prompts):
            got = shared.decode.complete(prompt, cache_salt=f"evict-{number}", max_tokens=4)
            assert same_tokens(got, local[number])
        shared.forget()


def test_int8_in_the_second_tier_takes_a_quarter_and_predicts_the_same(shared: Reuse) -> None:
    folder = shared.folder / "int8"
    shared.store_d.stop()
    start_again(shared, salt="again as int8", l2=folder, serde="disagg_int8")
    prompt = prompt_of(700, seed=11)
    local = shared.local(prompt)
    is_stored(shared.decode, shared.store_d)
    before = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shared.decode.complete(prompt, cache_salt="int8")
    is_stored(shared.decode, shared.store_d)
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) - before
    assert 0 < written <= 0.27 * 640 * TINY_TOKEN_BYTES
    shared.forget()
    shared.store_d.clear()
    counted = shared.count()
    got = shared.decode.complete(prompt, cache_salt="int8")
    assert counted("store_hit_tokens") == (640,)
    assert got.tokens[0] == local.tokens[0]
    assert got.top2_gaps[0] == pytest.approx(local.top2_gaps[0], abs=0.05)


def test_a_block_size_that_does_not_divide_the_chunk_is_a_clear_error(shared: Reuse) -> None:
    odd = settings("both", free_port(), cache=cache(shared.store_p))
    plan = Plan("odd-blocks", tiny(), free_port(), 0, odd, extra=("--block-size", "48"))
    with ExitStack() as stack, pytest.raises(EngineFailed):
        plan.start(stack, shared.folder)
    log = (shared.folder / "odd-blocks.log").read_text()
    (line, *_) = [line for line in log.splitlines() if "ConfigError: cache.lmcache" in line]
    assert f"chunk size {CHUNK}" in line
    assert "--block-size is 48" in line


@pytest.fixture(scope="module")
def smol(reuse: Reuse) -> Iterator[tuple[Engine, LMCacheServer]]:
    """SmolLM2 with a server of its own, whose second tier is the folder that D's writes to, as INT8."""
    server = LMCacheServer("smol", reuse.folder)
    with ExitStack() as stack:
        stack.callback(server.stop)
        server.start(l2=reuse.folder / "int8", serde="disagg_int8")
        plan = Plan(
            "smol",
            smollm2(),
            free_port(),
            0,
            settings("both", free_port(), cache=cache(server)),
            extra=("--max-logprobs", str(TOP), "--max-model-len", "1024"),
            env=FORGETS,
        )
        yield plan.start(stack, reuse.folder), server


def test_another_model_finds_nothing(shared: Reuse, smol: tuple[Engine, LMCacheServer]) -> None:
    engine, _ = smol
    is_stored(shared.decode, shared.store_d)
    counted = Counted(engine)
    engine.complete(prompt_of(700, seed=11), cache_salt="int8")  # what D stored, and found again
    assert counted("lookups", "store_hit_tokens") == (1, 0)


def test_kv_that_was_int8_in_the_second_tier_predicts_what_kv_predicts(
    shared: Reuse, smol: tuple[Engine, LMCacheServer]
) -> None:
    engine, server = smol
    compared = []
    for number, ids in enumerate(texts_of(engine, 4 * CHUNK + 101)):
        engine.complete(ids[: 4 * CHUNK], max_tokens=1, cache_salt=f"int8-{number}")
        is_stored(engine, server)
        server.clear()
        shared.forget(engine)
        counted = Counted(engine)
        compared += compare(
            ids,
            4 * CHUNK,
            lambda prefix, salt=f"local-{number}": top_logprobs(engine, prefix, salt),
            lambda prefix, salt=f"int8-{number}": top_logprobs(engine, prefix, salt),
        )
        assert counted("store_hit_tokens") == (4 * CHUNK,), "once; then it is in the engine's own prefix cache"
    assert_predicts_the_same(compared)


def test_without_its_server_an_engine_does_not_start(tmp_path: Path) -> None:
    nowhere = LMCacheServer("nowhere", tmp_path)
    plan = Plan("lonely", tiny(), free_port(), 0, settings("both", free_port(), cache=cache(nowhere)))
    with ExitStack() as stack, pytest.raises(EngineFailed):
        plan.start(stack, tmp_path)
    assert "no LMCache server at" in (tmp_path / "lonely.log").read_text()


def test_the_launcher_says_what_is_wrong_with_its_serializer(tmp_path: Path) -> None:
    server = LMCacheServer("wrong", tmp_path)
    with pytest.raises(EngineFailed):
        server.start(l2=tmp_path / "l2", serde="no_such")
    assert "disagg_int8" in (tmp_path / "lmcache-wrong.log").read_text(), "among those that it knows"
