"""Who gets a prompt: tables of situations, and what holds for every fleet."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_policies.placement import eligible, least_loaded, power_of_two, round_robin, score
from disagg_policies.snapshots import DecodeState, Link, Placement, PolicyState, Prompt, Snapshot, WorkerState

POLICIES = [score, least_loaded, round_robin, power_of_two]
LINK = Link(bytes_per_s=1e9, setup_s=0.001, wire_bytes_per_token=10_000)
PROMPT = Prompt("r", prompt_tokens=1_000, cached_tokens=0)


def worker(name: str, *, tokens: int = 0, requests: int = 0) -> WorkerState:
    return WorkerState(
        name, healthy=True, queued_requests=requests, max_prompt_tokens=8_000, queued_prefill_tokens=tokens, link=LINK
    )


A, B, C = worker("a"), worker("b"), worker("c")
LEAVES = replace(A, healthy=False, draining=True)


def fleet(*workers: WorkerState, overlap: tuple[int, ...] = (), request_id: str = "r", turn: int = 0) -> Snapshot:
    return Snapshot(
        replace(PROMPT, request_id=request_id), DecodeState("d0"), workers, overlap, previous=PolicyState(turn=turn)
    )


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.__name__)
@pytest.mark.parametrize(
    ("workers", "reason"),
    [
        pytest.param((), "no_workers", id="nobody configured"),
        pytest.param((replace(A, healthy=False),), "no_healthy_worker", id="nobody healthy"),
        pytest.param((replace(A, reported_s=-1.1),), "no_healthy_worker", id="report older than a second"),
        pytest.param((LEAVES,), "draining", id="the only one is to leave"),
        pytest.param((LEAVES, replace(B, healthy=False)), "draining", id="one is to leave, the other one is not there"),
        pytest.param((replace(LEAVES, reported_s=-1.1),), "no_healthy_worker", id="it has left"),
        pytest.param((LEAVES, worker("b", requests=4)), "queue_full", id="one is to leave, the other one is full"),
        pytest.param((replace(A, max_prompt_tokens=999),), "prompt_too_long", id="longer than anybody takes"),
        pytest.param((worker("a", requests=4),), "queue_full", id="queue at its limit"),
        pytest.param(
            (worker("a", requests=4), replace(B, max_prompt_tokens=1)), "queue_full", id="full here, too long there"
        ),
    ],
)
def test_nobody(policy: Callable[..., Placement], workers: tuple[WorkerState, ...], reason: str) -> None:
    assert policy(fleet(*workers), prefill_queue_max=4) == Placement((), reason)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.__name__)
def test_only_who_may_be_asked_is_named(policy: Callable[..., Placement]) -> None:
    sick, full, old = replace(A, healthy=False), worker("b", requests=9), replace(C, reported_s=-5.0)
    assert policy(fleet(sick, full, old, worker("d")), prefill_queue_max=4, limit=9).workers == ("d",)


@pytest.mark.parametrize(
    ("snapshot", "order"),
    [
        pytest.param(fleet(A, worker("b", tokens=100)), "ab", id="the shorter queue"),
        pytest.param(fleet(worker("a", tokens=100), replace(B, in_flight_tokens=200)), "ab", id="what we sent counts"),
        pytest.param(fleet(A, B, overlap=(0, 256)), "ba", id="the one with the prefix"),
        pytest.param(fleet(A, B, overlap=(512, 256)), "ab", id="the one with more of the prefix"),
        pytest.param(fleet(A, worker("b", tokens=300), overlap=(0, 896)), "ba", id="a prefix is worth a short queue"),
        pytest.param(fleet(A, worker("b", tokens=3_000), overlap=(0, 896)), "ab", id="but not a long one: a hotspot"),
        pytest.param(
            fleet(worker("a", tokens=3_000), worker("b", tokens=3_000), overlap=(0, 896)),
            "ba",
            id="a long queue is no hotspot where all are long",
        ),
        pytest.param(fleet(A, replace(B, kv_usage=0.5)), "ab", id="more free cache"),
        pytest.param(fleet(A, replace(B, running_requests=8)), "ab", id="fewer running requests"),
        pytest.param(fleet(A, replace(B, link=replace(LINK, bytes_per_s=1e8))), "ab", id="the faster link"),
        pytest.param(fleet(A, replace(B, prefill_tokens_per_s=300.0)), "ab", id="the faster worker"),
        pytest.param(
            fleet(worker("a", tokens=400), replace(worker("b", tokens=900), prefill_tokens_per_s=3_000.0)),
            "ba",
            id="a queue counts in seconds, not in tokens",
        ),
        pytest.param(
            fleet(A, B, replace(C, queued_prefill_tokens=90_000, healthy=False), overlap=(64, 0, 0)),
            "ab",
            id="a failed worker is not asked",
        ),
    ],
)
def test_score(snapshot: Snapshot, order: str) -> None:
    assert "".join(score(snapshot).workers) == order


def test_without_hotspot_prevention_a_prefix_is_a_magnet() -> None:
    snapshot = fleet(A, worker("b", tokens=50_000), overlap=(0, 896))
    assert score(snapshot, enable_hotspot_prevention=False).workers[0] == "b"
    assert score(snapshot).workers[0] == "a"


def test_a_worker_above_its_share_loses_its_bonus_in_proportion() -> None:
    """The prefix is all that has weight; the other's queue is 1 s, the prompt's own work 1 s."""
    scores = [
        score(
            fleet(worker("a", tokens=1_000), worker("b", tokens=tokens), overlap=(0, 1_000)),
            queue_length_weight=0.0,
            decode_load_weight=0.0,
            link_weight=0.0,
            limit=9,
        )
        for tokens in (1_000, 2_000, 2_500, 3_000, 9_000)
    ]
    assert [dict(zip(s.workers, s.scores, strict=True))["b"] for s in scores] == pytest.approx([1, 0.5, 0.25, 0, 0])


def test_scores_are_between_0_and_1_and_descend() -> None:
    placement = score(fleet(A, worker("b", tokens=500), replace(C, kv_usage=1.0), overlap=(0, 1_000, 0)), limit=3)
    assert sorted(placement.scores, reverse=True) == list(placement.scores)
    assert all(0 <= value <= 1 for value in placement.scores)


@pytest.mark.parametrize(
    ("workers", "order"),
    [
        pytest.param((worker("a", tokens=2), worker("b", tokens=1)), "ba", id="fewer tokens"),
        pytest.param((worker("a", requests=2), worker("b", requests=1)), "ba", id="fewer requests of equal length"),
        pytest.param(
            (worker("a", tokens=200), replace(worker("b", tokens=300), prefill_tokens_per_s=2_000.0)),
            "ba",
            id="more tokens, but sooner done",
        ),
    ],
)
def test_least_loaded(workers: tuple[WorkerState, ...], order: str) -> None:
    assert "".join(least_loaded(fleet(*workers)).workers) == order


def test_round_robin_takes_turns() -> None:
    firsts = [round_robin(fleet(A, B, C, turn=turn)).workers[0] for turn in range(6)]
    assert sorted(firsts[:3]) == ["a", "b", "c"]
    assert firsts[:3] == firsts[3:]


def test_round_robin_of_many_decode_engines_does_not_start_at_one_worker() -> None:
    snapshots = [replace(fleet(A, B), decode=DecodeState(f"d{number}")) for number in range(40)]
    assert 10 <= Counter(round_robin(s).workers[0] for s in snapshots)["a"] <= 30


def test_power_of_two_never_picks_the_most_loaded_and_spreads_over_the_rest() -> None:
    workers = [worker(f"p{i}", tokens=i) for i in range(8)]
    firsts = Counter(power_of_two(fleet(*workers, request_id=str(i))).workers[0] for i in range(2_000))
    assert "p7" not in firsts
    expected = {f"p{i}": 2_000 * (7 - i) / 28 for i in range(7)}  # pairs in which it is the less loaded
    assert all(abs(firsts[name] - count) < 5 * count**0.5 for name, count in expected.items())


@pytest.mark.parametrize("policy", [score, least_loaded, power_of_two], ids=lambda p: p.__name__)
def test_ties_spread_evenly_over_requests_and_decode_engines(policy: Callable[..., Placement]) -> None:
    workers = tuple(worker(f"p{i}") for i in range(5))
    by_request = Counter(policy(fleet(*workers, request_id=str(i))).workers for i in range(2_000))
    by_engine = Counter(policy(replace(fleet(*workers), decode=DecodeState(f"d{i}"))).workers[0] for i in range(2_000))
    firsts = Counter[str]()
    for names, count in by_request.items():
        firsts[names[0]] += count
    assert len(by_request) == 20  # every ordered pair
    assert all(300 < count < 500 for count in (*firsts.values(), *by_engine.values()))
    assert max(by_request.values()) < 170  # 100 expected


# -- what holds for every fleet -------------------------------------------------------------------------------------

links = st.builds(Link, st.floats(1e6, 1e11), st.floats(0, 0.1), st.sampled_from([1e3, 1e5]))


@st.composite
def fleets(draw: st.DrawFn, *, least: int = 2) -> Snapshot:
    count = draw(st.integers(least, 6))
    tokens = draw(st.integers(1, 8_000))
    workers = tuple(
        WorkerState(
            f"p{i}",
            healthy=draw(st.booleans()) if least < 2 else True,
            queued_requests=draw(st.integers(0, 40)),
            max_prompt_tokens=8_000,
            queued_prefill_tokens=draw(st.integers(0, 50_000)),
            running_requests=draw(st.integers(0, 64)),
            kv_usage=draw(st.floats(0, 1)),
            prefill_tokens_per_s=draw(st.floats(100, 100_000)),
            in_flight_tokens=draw(st.integers(0, 9_000)),
            link=draw(links),
        )
        for i in range(count)
    )
    overlap = tuple(draw(st.integers(0, tokens)) for _ in workers)
    return Snapshot(Prompt(draw(st.text(max_size=5)), tokens, 0), DecodeState("d"), workers, overlap)


def rank(placement: Placement, name: str) -> int:
    return placement.workers.index(name)


def with_worker(snapshot: Snapshot, index: int, changed: WorkerState) -> Snapshot:
    workers = list(snapshot.workers)
    workers[index] = changed
    return replace(snapshot, workers=tuple(workers))


@pytest.mark.parametrize("policy", [score, least_loaded], ids=lambda p: p.__name__)
@given(data=st.data())
def test_a_longer_queue_never_makes_a_worker_more_attractive(
    policy: Callable[..., Placement], data: st.DataObject
) -> None:
    snapshot = data.draw(fleets())
    index = data.draw(st.integers(0, len(snapshot.workers) - 1))
    before = snapshot.workers[index]
    field = data.draw(st.sampled_from(["queued_prefill_tokens", "in_flight_tokens"]))
    longer = replace(before, **{field: getattr(before, field) + data.draw(st.integers(1, 50_000))})
    name = before.worker
    after = policy(with_worker(snapshot, index, longer), limit=9)
    assert rank(after, name) >= rank(policy(snapshot, limit=9), name)


@pytest.mark.parametrize("policy", [score, least_loaded], ids=lambda p: p.__name__)
@given(data=st.data())
def test_one_workers_failure_never_changes_the_order_of_the_others(
    policy: Callable[..., Placement], data: st.DataObject
) -> None:
    snapshot = data.draw(fleets())
    index = data.draw(st.integers(0, len(snapshot.workers) - 1))
    failed = replace(snapshot.workers[index], healthy=False)
    before = policy(snapshot, limit=9).workers
    after = policy(with_worker(snapshot, index, failed), limit=9).workers
    assert after == tuple(name for name in before if name != failed.worker)


@given(data=st.data())
def test_nor_does_its_removal_where_no_share_depends_on_it(data: st.DataObject) -> None:
    snapshot = data.draw(fleets())
    gone = data.draw(st.integers(0, len(snapshot.workers) - 1))
    rest = replace(
        snapshot,
        workers=snapshot.workers[:gone] + snapshot.workers[gone + 1 :],
        overlap_tokens=snapshot.overlap_tokens[:gone] + snapshot.overlap_tokens[gone + 1 :],
    )
    before = score(snapshot, limit=9, enable_hotspot_prevention=False).workers
    after = score(rest, limit=9, enable_hotspot_prevention=False).workers
    assert after == tuple(name for name in before if name != snapshot.workers[gone].worker)


@given(snapshot=fleets(), factor=st.floats(1e-3, 1e3))
def test_weights_scaled_together_change_nothing(snapshot: Snapshot, factor: float) -> None:
    weights = {"prefix_cache_weight": 10.0, "queue_length_weight": 1.5, "decode_load_weight": 0.5, "link_weight": 1.0}
    plain = score(snapshot, limit=9)
    scaled = score(snapshot, limit=9, **{name: weight * factor for name, weight in weights.items()})
    assert scaled.workers == plain.workers
    assert scaled.scores == pytest.approx(plain.scores)


@given(snapshot=fleets(least=1))
def test_all_policies_name_the_same_workers(snapshot: Snapshot) -> None:
    expected = {snapshot.workers[index].worker for index in eligible(snapshot.prompt.prompt_tokens, snapshot.workers)}
    for policy in POLICIES:
        assert set(policy(snapshot, limit=9).workers) == expected
