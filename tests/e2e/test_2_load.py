"""Many prompts queued at one prefill worker leave the decode engine responsive; an idle pair costs no CPU."""

from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from e2e.client import Engine, same_tokens
from e2e.conftest import Fleet, settle
from e2e.offloads import Offloads, prompt_of
from engine_processes import slowed

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

WINDOW_S = 5.0


def test_a_queue_at_the_prefill_worker_does_not_hold_up_short_prompts(pair: Fleet) -> None:
    """20 prompts of 2,900 tokens; the decode engine's cache holds five of them.

    Nothing here depends on seconds: ``benchmarks/short_behind_long.py`` takes the time.
    """
    shorts = [prompt_of(20, seed=100 + i) for i in range(30)]
    longs = [prompt_of(2_900, seed=200 + i) for i in range(20)]
    counted = Offloads(pair.decode)
    preemptions = _preemptions(pair.decode)
    with ThreadPoolExecutor(20) as pool:
        with slowed(pair.prefill):
            futures = [pool.submit(pair.decode.complete, p, max_tokens=4, cache_salt="queue") for p in longs]
            pair.decode.when(lambda v: len(v["decode"]["open"]) >= 10)
            for short in shorts:
                pair.decode.complete(short, max_tokens=1)
            still_open = len(pair.decode.snapshot()["decode"]["open"])
        answers = [future.result() for future in futures]
    totals = counted.totals()
    assert still_open >= 10, "30 short prompts, one after the other, are through before the queue is"
    assert (totals["landed"], totals["fallbacks"]) == (20, 0)
    assert _preemptions(pair.decode) == preemptions
    for prompt, got in zip(longs[::5], answers[::5], strict=True):
        assert same_tokens(got, pair.stock.complete(prompt, max_tokens=4, cache_salt="local"))


def _preemptions(engine: Engine) -> float:
    text = engine.http.get(f"{engine.url}/metrics").text
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith("vllm:num_preemptions_total")
    )


def _cpu_s(engine: Engine) -> float:
    """CPU seconds of an engine's processes so far."""
    total = 0.0
    root = psutil.Process(engine.pid)
    for process in [root, *root.children(recursive=True)]:
        times = process.cpu_times()
        total += times.user + times.system
    return total


def test_an_idle_pair_uses_no_more_cpu_than_a_stock_engine(pair: Fleet) -> None:
    """After transfers; the side channel's heartbeats are all that goes on."""
    engines = {"prefill": pair.prefill, "decode": pair.decode, "stock": pair.stock}
    for engine in (pair.prefill, pair.decode):
        settle(engine)
    psutil.cpu_percent(interval=3.0)  # let the data-plane threads' linger pass
    before = {name: _cpu_s(engine) for name, engine in engines.items()}
    psutil.cpu_percent(interval=WINDOW_S)
    cores = {name: (_cpu_s(engine) - before[name]) / WINDOW_S for name, engine in engines.items()}
    assert cores["prefill"] <= cores["stock"] + 0.05, cores
    assert cores["decode"] <= cores["stock"] + 0.05, cores
