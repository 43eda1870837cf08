"""A long uncached prompt goes to the least busy healthy worker; everything else stays."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_policies.offload import Local, Offload, Prompt, WorkerState, threshold
from disagg_policies.snapshots import Placement

LONG = Prompt("r", prompt_tokens=1_000, cached_tokens=0)
IDLE = WorkerState("p0", healthy=True, queued_requests=0, max_prompt_tokens=4_000)


def decide(prompt: Prompt, workers: list[WorkerState], ratio: float | None = None) -> Local | Offload:
    return threshold(
        prompt,
        workers,
        prompt_length_threshold=256,
        prefill_queue_max=4,
        decode_engine="d",
        min_cache_hit_ratio=ratio,
        now_s=100.0 if any(w.reported_s for w in workers) else 0.0,
    )


@pytest.mark.parametrize(
    ("prompt", "workers", "expected"),
    [
        pytest.param(LONG, [IDLE], Offload(("p0",), "over_threshold"), id="long prompt and an idle worker"),
        pytest.param(replace(LONG, prompt_tokens=256), [IDLE], Local("short_prompt"), id="exactly the threshold"),
        pytest.param(replace(LONG, prompt_tokens=257), [IDLE], Offload(("p0",), "over_threshold"), id="one token over"),
        pytest.param(replace(LONG, cached_tokens=800), [IDLE], Local("cached_enough"), id="long but mostly cached"),
        pytest.param(replace(LONG, lmcache_tokens=800), [IDLE], Local("cached_enough"), id="long but in LMCache"),
        pytest.param(
            replace(LONG, cached_tokens=500, lmcache_tokens=600),
            [IDLE],
            Offload(("p0",), "over_threshold"),
            id="two caches hold the same prefix, not twice as much",
        ),
        pytest.param(LONG, [], Local("no_workers"), id="nobody configured"),
        pytest.param(LONG, [replace(IDLE, healthy=False)], Local("no_healthy_worker"), id="nobody healthy"),
        pytest.param(
            LONG, [replace(IDLE, reported_s=98.9)], Local("no_healthy_worker"), id="report older than a second"
        ),
        pytest.param(
            LONG, [replace(IDLE, reported_s=99.0)], Offload(("p0",), "over_threshold"), id="report just a second old"
        ),
        pytest.param(LONG, [replace(IDLE, queued_requests=4)], Local("queue_full"), id="queue at its limit"),
        pytest.param(
            LONG,
            [replace(IDLE, queued_requests=1, in_flight_requests=3)],
            Local("queue_full"),
            id="queue at its limit with what we sent since the report",
        ),
        pytest.param(LONG, [replace(IDLE, max_prompt_tokens=999)], Local("prompt_too_long"), id="longer than it takes"),
        pytest.param(
            LONG,
            [replace(IDLE, queued_requests=2), replace(IDLE, worker="p1"), replace(IDLE, worker="p2", healthy=False)],
            Offload(("p1", "p0"), "over_threshold"),
            id="the shorter queue first, the other as second choice",
        ),
    ],
)
def test_threshold(prompt: Prompt, workers: list[WorkerState], expected: Local | Offload) -> None:
    assert decide(prompt, workers) == expected


@pytest.mark.parametrize(
    ("cached_tokens", "ratio", "reason"),
    [
        pytest.param(600, 0.75, "over_threshold", id="too little of it is cached"),
        pytest.param(739, 0.74, "over_threshold", id="one token short of the ratio"),
        pytest.param(740, 0.74, "cached_enough", id="exactly the ratio"),
        pytest.param(740, None, "over_threshold", id="no ratio asked for"),
        pytest.param(900, 0.99, "cached_enough", id="below the ratio but little left to compute"),
    ],
)
def test_a_prompt_cached_to_the_ratio_stays(cached_tokens: int, ratio: float | None, reason: str) -> None:
    assert decide(replace(LONG, cached_tokens=cached_tokens), [IDLE], ratio).reason == reason


@pytest.mark.parametrize(
    ("placement", "workers", "expected"),
    [
        pytest.param(
            Placement(("p1", "p0"), "score"),
            [IDLE, replace(IDLE, worker="p1", queued_requests=3)],
            Offload(("p1", "p0"), "over_threshold"),
            id="in the placement's order",
        ),
        pytest.param(
            Placement(("p1", "p0"), "score"),
            [IDLE, replace(IDLE, worker="p1", queued_requests=4)],
            Offload(("p0",), "over_threshold"),
            id="without the one whose queue is full",
        ),
        pytest.param(
            Placement(("p0",), "score"), [replace(IDLE, queued_requests=4)], Local("queue_full"), id="all are full"
        ),
        pytest.param(
            Placement((), "prompt_too_long"), [IDLE], Local("prompt_too_long"), id="the placement says why not"
        ),
    ],
)
def test_a_placement_says_whom_to_ask(
    placement: Placement, workers: list[WorkerState], expected: Local | Offload
) -> None:
    assert threshold(LONG, workers, prompt_length_threshold=256, prefill_queue_max=4, placement=placement) == expected


@given(st.integers(0, 5_000), st.integers(0, 5_000), st.integers(0, 8))
def test_it_offloads_exactly_when_the_rule_says_so(prompt_tokens: int, cached_tokens: int, queue: int) -> None:
    cached_tokens = min(cached_tokens, prompt_tokens)
    worker = replace(IDLE, queued_requests=queue, max_prompt_tokens=10_000)
    decision = decide(Prompt("r", prompt_tokens, cached_tokens), [worker])
    assert isinstance(decision, Offload) == (prompt_tokens - cached_tokens > 256 and queue < 4)


def test_equal_workers_share_the_work_evenly() -> None:
    workers = [replace(IDLE, worker="p0"), replace(IDLE, worker="p1")]
    decisions = [decide(replace(LONG, request_id=str(i)), workers) for i in range(1_000)]
    first = sum(d.workers[0] == "p0" for d in decisions if isinstance(d, Offload))
    assert 400 < first < 600
