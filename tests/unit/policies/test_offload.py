"""A long uncached prompt goes to the least busy healthy worker; everything else stays."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_policies.offload import Local, Offload, Prompt, WorkerState, threshold

LONG = Prompt("r", prompt_tokens=1_000, cached_tokens=0)
IDLE = WorkerState("p0", healthy=True, queued_requests=0, max_prompt_tokens=4_000)


def decide(prompt: Prompt, workers: list[WorkerState]) -> Local | Offload:
    return threshold(prompt, workers, prompt_length_threshold=256, prefill_queue_max=4, decode_engine="d")


@pytest.mark.parametrize(
    ("prompt", "workers", "expected"),
    [
        pytest.param(LONG, [IDLE], Offload(("p0",), "over_threshold"), id="long prompt and an idle worker"),
        pytest.param(replace(LONG, prompt_tokens=256), [IDLE], Local("short_prompt"), id="exactly the threshold"),
        pytest.param(replace(LONG, prompt_tokens=257), [IDLE], Offload(("p0",), "over_threshold"), id="one token over"),
        pytest.param(replace(LONG, cached_tokens=800), [IDLE], Local("cached_enough"), id="long but mostly cached"),
        pytest.param(LONG, [], Local("no_workers"), id="nobody configured"),
        pytest.param(LONG, [replace(IDLE, healthy=False)], Local("no_healthy_worker"), id="nobody healthy"),
        pytest.param(LONG, [replace(IDLE, queued_requests=4)], Local("queue_full"), id="queue at its limit"),
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
