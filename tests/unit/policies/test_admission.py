"""Who is served when not everybody can be: the urgent before the others, and nobody turned away for nothing."""

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_policies.admission import (
    current_queue,
    degradation_level,
    forecast,
    projected,
    retry_after_s,
    work_ahead,
)
from disagg_policies.admission_snapshots import (
    NEVER_OFFLOAD,
    ONLY_OFFLOAD,
    Admission,
    AdmissionSnapshot,
    Admitted,
    Arrival,
    QueuedWork,
    Refused,
    ServiceClass,
)
from disagg_policies.snapshots import DecodeModel, DecodeState, Link, PrefillModel, WorkerState

HIGH = ServiceClass("high", -1, ttft_slo_s=1.0, tpot_slo_s=0.05)
NORMAL = ServiceClass("normal", 0, ttft_slo_s=2.0, tpot_slo_s=0.05)
LOW = ServiceClass("low", 1, ttft_slo_s=4.0)
CLASSES = (HIGH, NORMAL, LOW)
MODEL = PrefillModel(base_s=0.0, per_token_s=1e-3, per_pair_s=0.0)  # a second per 1,000 tokens
DECODE = DecodeState(prefill=MODEL, decode=DecodeModel(0.01, 1e-3, 0.0))
WORKER = WorkerState("p0", healthy=True, queued_requests=0, max_prompt_tokens=64_000, prefill=MODEL, link=Link())
POLICIES: tuple[Callable[[AdmissionSnapshot], Admission], ...] = (
    projected,
    current_queue,
    functools.partial(projected, low_priority_threshold_s=0.5),
)


def snapshot(service_class: str = "normal", prompt_tokens: int = 500, **changes: object) -> AdmissionSnapshot:
    return replace(AdmissionSnapshot(Arrival(service_class, prompt_tokens), CLASSES, DECODE), **changes)  # type: ignore[arg-type]


def queued(*tokens_by_priority: tuple[int, int]) -> tuple[QueuedWork, ...]:
    return tuple(QueuedWork(priority, max(1, tokens // 500), tokens) for priority, tokens in tokens_by_priority)


def behind(*tokens_by_priority: tuple[int, int]) -> WorkerState:
    """A worker with a queue, that schedules by priority and does 1,000 tokens a second."""
    tokens = sum(tokens for _, tokens in tokens_by_priority)
    return replace(WORKER, queued_prefill_tokens=tokens, by_priority=tokens_by_priority, prefill_tokens_per_s=1_000.0)


FAST = replace(WORKER, prefill=PrefillModel(0.0, 1e-4, 0.0))
RUNNING = replace(DECODE, running_decodes=60)
SITUATIONS = [
    pytest.param(snapshot(), "fits", id="nobody is there"),
    pytest.param(snapshot(prompt_tokens=9_000), "long", id="longer than its SLO on an idle engine"),
    pytest.param(snapshot(queued=queued((0, 1_000))), "fits", id="a second of queue, two allowed"),
    pytest.param(snapshot(queued=queued((0, 3_000))), "lower_class_fits", id="late, but low would be served"),
    pytest.param(snapshot(queued=queued((0, 6_000))), "ttft", id="late in any class"),
    pytest.param(snapshot("high", queued=queued((0, 60_000))), "fits", id="high overtakes the queue"),
    pytest.param(
        snapshot("high", queued=queued((0, 60_000)), reorders=False), "ttft", id="no overtaking in this engine"
    ),
    pytest.param(snapshot(queued=queued((0, 6_000)), workers=(WORKER,)), "fits", id="late here, in time elsewhere"),
    pytest.param(
        snapshot(queued=queued((0, 6_000)), workers=(replace(WORKER, healthy=False),)), "ttft", id="worker is gone"
    ),
    pytest.param(
        snapshot(classes=(NORMAL,), decode=RUNNING), "tpot", id="60 decodes make 71 ms a token, 50 were promised"
    ),
    pytest.param(snapshot("low", decode=RUNNING), "fits", id="nothing was promised about tokens"),
    pytest.param(
        snapshot(prompt_tokens=2_000, classes=(NORMAL,), decode=RUNNING, decode_lasts_s=4.0),
        "fits",
        id="half of the decodes will have ended by then",
    ),
    pytest.param(
        snapshot(
            prompt_tokens=2_000, classes=(NORMAL,), decode=RUNNING, decode_lasts_s=4.0, landing=(QueuedWork(0, 20, 0),)
        ),
        "tpot",
        id="and others will have come",
    ),
    pytest.param(
        snapshot("high", classes=(HIGH, NORMAL), landing=(QueuedWork(-1, 60, 0),)),
        "tpot",
        id="so many of one's own class",
    ),
    pytest.param(
        snapshot("high", classes=(HIGH, NORMAL), landing=(QueuedWork(0, 60, 0),)),
        "fits",
        id="those of lower classes come later",
    ),
    pytest.param(
        snapshot("low", kv_capacity_tokens=10_000, decode=replace(DECODE, kv_usage=0.99), decode_lasts_s=300.0),
        "ttft",
        id="no room in the KV cache for a long time",
    ),
    pytest.param(
        snapshot("low", max_running=4, decode=replace(DECODE, running_decodes=4), decode_lasts_s=60.0),
        "ttft",
        id="no place in the batch for a long time",
    ),
    pytest.param(
        snapshot(prompt_tokens=2_500, classes=(NORMAL,), workers=(FAST,), offload_above_tokens=256),
        "fits",
        id="too long for here, sent to where it is fast",
    ),
    pytest.param(
        snapshot(workers=(behind((0, 6_000)),), offload_above_tokens=256),
        "ttft",
        id="nobody waits here, but it will be sent to where they do",
    ),
    pytest.param(
        snapshot(workers=(behind((0, 6_000)),), offload_above_tokens=1_000), "fits", id="too short to be sent there"
    ),
    pytest.param(
        snapshot("high", workers=(behind((1, 60_000)),), offload_above_tokens=256),
        "fits",
        id="high overtakes the queue of a worker",
    ),
    pytest.param(
        snapshot("low", workers=(behind((1, 3_000)),), offload_above_tokens=256), "fits", id="three seconds of low"
    ),
    pytest.param(
        snapshot("low", workers=(behind((1, 3_000)),), offload_above_tokens=256, arriving=((-1, 500.0),)),
        "ttft",
        id="which take six, as high ones take half of the speed",
    ),
    pytest.param(
        snapshot(reserved=queued((0, 6_000)), workers=(WORKER,)), "ttft", id="others are on their way to the engine"
    ),
    pytest.param(snapshot(classes=(NORMAL,), decode_stall_s=0.045), "tpot", id="prompts in its steps make tokens late"),
    pytest.param(snapshot(draining=True), "draining", id="shutting down"),
    pytest.param(snapshot(serves=False), "no_capacity", id="no engine"),
    pytest.param(snapshot(overused=True), "fair_share", id="had its share"),
]


@pytest.mark.parametrize(("seen", "reason"), SITUATIONS)
def test_projected(seen: AdmissionSnapshot, reason: str) -> None:
    assert projected(seen).reason == reason


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        pytest.param(snapshot(), "fits", id="nobody is there"),
        pytest.param(snapshot("low", queued=queued((0, 3_000))), "low_priority", id="0.6 s, low has half a second"),
        pytest.param(snapshot(queued=queued((0, 3_000))), "fits", id="0.6 s, normal has two"),
        pytest.param(snapshot(queued=queued((0, 30_000))), "ttft", id="6 s"),
        pytest.param(snapshot("high", queued=queued((0, 30_000))), "protected", id="6 s, high"),
        pytest.param(snapshot(decode=replace(DECODE, running_decodes=30)), "ttft", id="running decodes count"),
    ],
)
def test_current_queue(seen: AdmissionSnapshot, reason: str) -> None:
    assert current_queue(seen).reason == reason


def test_without_reject_on_slo_violation_the_late_are_served() -> None:
    late = snapshot(queued=queued((0, 60_000)))
    assert projected(late, reject_on_slo_violation=False).reason == "late"
    assert current_queue(late, reject_on_slo_violation=False).reason == "late"


def test_the_lowest_of_several_classes_has_a_threshold_of_its_own() -> None:
    waiting = snapshot("low", queued=queued((0, 1_000)))
    assert projected(waiting).reason == "fits"
    for reject in (True, False):
        answer = projected(waiting, low_priority_threshold_s=1.0, reject_on_slo_violation=reject)
        assert (answer.reason, isinstance(answer, Refused)) == ("low_priority", True)
    assert projected(replace(waiting, classes=(LOW,)), low_priority_threshold_s=1.0).reason == "fits"


@pytest.mark.parametrize("policy", POLICIES)
def test_only_what_nobody_gets_is_503(policy: Callable[[AdmissionSnapshot], Admission]) -> None:
    answers = [policy(param.values[0]) for param in SITUATIONS]  # type: ignore[arg-type]
    assert all(
        answer.unavailable == (answer.reason in ("draining", "no_capacity"))
        for answer in answers
        if isinstance(answer, Refused)
    )


def test_a_conversation_that_is_cached_is_not_refused_as_if_it_were_new() -> None:
    """30k tokens take 30 s here; of this conversation 29k are in the cache."""
    behind = snapshot(prompt_tokens=30_000, queued=queued((0, 500)), classes=(NORMAL,))
    cached = replace(behind, request=Arrival("normal", 30_000, cached_tokens=29_000))
    answer = projected(cached)
    assert isinstance(answer, Admitted)
    assert answer.reason == "fits"
    assert answer.ttft_s == pytest.approx(1.5)
    crowded = replace(behind, queued=queued((0, 4_000)))
    assert isinstance(projected(crowded), Refused)


def test_more_attention_is_paid_for_the_cached_part() -> None:
    attention = replace(DECODE, prefill=replace(MODEL, per_pair_s=1e-8))
    new = snapshot("normal", 1_000, decode=attention)
    cached = replace(new, request=Arrival("normal", 30_000, 29_000))
    assert forecast(new, NORMAL).local_s < forecast(cached, NORMAL).local_s < 1.5


# -- properties ------------------------------------------------------------------------------------------------------

counts = st.integers(0, 200)
tokens = st.integers(0, 40_000)
seconds = st.floats(0.01, 20.0)


by_priority = st.dictionaries(st.integers(-4, 4), tokens, max_size=3)
rates = st.lists(st.tuples(st.integers(-4, 4), st.floats(0.0, 1e6)), max_size=3).map(tuple)
works = st.lists(st.builds(QueuedWork, st.integers(-4, 4), counts, tokens), max_size=3).map(tuple)


@st.composite
def workers(draw: st.DrawFn) -> WorkerState:
    return replace(
        WORKER,
        healthy=draw(st.booleans()),
        queued_prefill_tokens=draw(tokens),
        in_flight_tokens=draw(tokens),
        max_prompt_tokens=draw(st.sampled_from([1_000, 64_000])),
        by_priority=tuple(draw(by_priority).items()),
    )


@st.composite
def snapshots(draw: st.DrawFn) -> AdmissionSnapshot:
    priorities = sorted(draw(st.sets(st.integers(-3, 3), min_size=1, max_size=4)))
    steps = st.lists(st.sampled_from(["max_tokens:64", NEVER_OFFLOAD, ONLY_OFFLOAD]), unique=True, max_size=3)
    classes = tuple(
        ServiceClass(
            f"c{priority}", priority, draw(seconds), draw(st.none() | st.floats(0.001, 0.5)), tuple(draw(steps))
        )
        for priority in priorities
    )
    prompt_tokens = draw(st.integers(1, 40_000))
    return AdmissionSnapshot(
        Arrival(draw(st.sampled_from(classes)).name, prompt_tokens, draw(st.integers(0, prompt_tokens))),
        classes,
        replace(
            DECODE,
            prefill=PrefillModel(0.005, draw(st.floats(1e-5, 1e-2)), draw(st.floats(0.0, 1e-6))),
            running_decodes=draw(counts),
            decode_context_tokens=draw(tokens),
            kv_usage=draw(st.floats(0.0, 1.0)),
        ),
        tuple(draw(st.lists(workers(), max_size=3))),
        tuple(draw(st.lists(st.builds(QueuedWork, st.integers(-4, 4), counts, tokens), max_size=4))),
        reorders=draw(st.booleans()),
        landing=tuple(draw(works)),
        decode_lasts_s=draw(seconds),
        mean_prefill_s=draw(st.floats(0.0, 1.0)),
        mean_decode_s=draw(st.floats(0.0, 1.0)),
        drain_tokens_per_s=draw(st.none() | st.floats(1.0, 1e6)),
        kv_capacity_tokens=draw(st.none() | st.integers(1_000, 1_000_000)),
        max_running=draw(st.none() | st.integers(1, 256)),
        level=draw(st.integers(0, 3)),
        reserved=draw(works),
        offload_above_tokens=draw(st.none() | st.integers(0, 2_000)),
        decode_stall_s=draw(st.floats(0.0, 0.5)),
        arriving=draw(rates),
        mean_prompt_tokens=draw(st.just(0.0) | st.floats(1.0, 1e5)),
    )


@st.composite
def loads(draw: st.DrawFn) -> tuple[AdmissionSnapshot, AdmissionSnapshot]:
    """One situation, and the same one with more load of any kind; a lost worker is less capacity, not more load."""
    less = draw(snapshots())
    more = replace(
        less,
        decode=replace(
            less.decode,
            running_decodes=less.decode.running_decodes + draw(counts),
            decode_context_tokens=less.decode.decode_context_tokens + draw(tokens),
            kv_usage=draw(st.floats(less.decode.kv_usage, 1.0)),
        ),
        queued=(*less.queued, *draw(st.lists(st.builds(QueuedWork, st.integers(-4, 4), counts, tokens), max_size=3))),
        workers=tuple(
            replace(
                worker,
                queued_prefill_tokens=worker.queued_prefill_tokens + draw(tokens),
                in_flight_tokens=worker.in_flight_tokens + draw(tokens),
            )
            for worker in less.workers
        ),
        landing=(*less.landing, *draw(works)),
        reserved=(*less.reserved, *draw(works)),
        decode_stall_s=less.decode_stall_s + draw(st.floats(0.0, 0.5)),
        arriving=(*less.arriving, *draw(rates)),
    )
    return less, more


@pytest.mark.parametrize("policy", POLICIES)
@given(pair=loads())
def test_more_load_never_turns_refuse_into_admit(
    policy: Callable[[AdmissionSnapshot], Admission], pair: tuple[AdmissionSnapshot, AdmissionSnapshot]
) -> None:
    less, more = map(policy, pair)
    if isinstance(less, Refused):
        assert isinstance(more, Refused)


@pytest.mark.parametrize("policy", POLICIES)
@given(seen=snapshots())
def test_a_higher_class_is_never_refused_while_a_lower_one_is_admitted(
    policy: Callable[[AdmissionSnapshot], Admission], seen: AdmissionSnapshot
) -> None:
    answers = [
        policy(replace(seen, request=replace(seen.request, service_class=service_class.name)))
        for service_class in seen.classes
    ]
    admitted = [isinstance(answer, Admitted) for answer in answers]
    assert admitted == sorted(admitted, reverse=True)


@pytest.mark.parametrize("policy", POLICIES)
@given(pair=loads())
def test_retry_after_is_1_to_60_s_and_falls_with_falling_load(
    policy: Callable[[AdmissionSnapshot], Admission], pair: tuple[AdmissionSnapshot, AdmissionSnapshot]
) -> None:
    less, more = map(policy, pair)
    for answer in (less, more):
        if isinstance(answer, Refused):
            assert isinstance(answer.retry_after_s, int)
            assert 1 <= answer.retry_after_s <= 60
    if isinstance(less, Refused) and isinstance(more, Refused) and less.reason == more.reason:
        assert less.retry_after_s <= more.retry_after_s


@pytest.mark.parametrize("policy", POLICIES)
@given(seen=snapshots(), draining=st.booleans(), serves=st.booleans(), overused=st.booleans())
def test_a_prompt_that_was_prefilled_elsewhere_is_never_refused(
    policy: Callable[[AdmissionSnapshot], Admission],
    seen: AdmissionSnapshot,
    draining: bool,
    serves: bool,
    overused: bool,
) -> None:
    done = replace(seen.request, remote_prefill_done=True)
    answer = policy(replace(seen, request=done, draining=draining, serves=serves, overused=overused))
    assert isinstance(answer, Admitted)


@given(seen=snapshots())
def test_idle_engines_admit_everybody(seen: AdmissionSnapshot) -> None:
    idle = replace(
        seen, decode=replace(seen.decode, running_decodes=0, decode_context_tokens=0, kv_usage=0.0), queued=()
    )
    nothing = tuple(
        replace(worker, queued_prefill_tokens=0, in_flight_tokens=0, by_priority=()) for worker in seen.workers
    )
    idle = replace(idle, workers=nothing, landing=(), kv_capacity_tokens=None)
    idle = replace(idle, reserved=(), decode_stall_s=0.0)
    assert isinstance(projected(idle), Admitted)
    assert isinstance(current_queue(idle), Admitted)


@given(seen=snapshots())
def test_what_a_class_overtakes_is_not_ahead_of_it(seen: AdmissionSnapshot) -> None:
    ahead = [work_ahead(seen, service_class).tokens for service_class in seen.classes]
    assert ahead == sorted(ahead)


# -- Retry-After -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("excess_s", "drain_tokens_per_s", "expected"),
    [
        pytest.param(0.2, None, 1, id="at least one second"),
        pytest.param(7.2, None, 8, id="whole seconds, rounded up"),
        pytest.param(7.2, 500.0, 15, id="the queue drains half as fast as the model says"),
        pytest.param(7.2, 4_000.0, 8, id="nothing drains faster than it can be computed"),
        pytest.param(7.2, 0.0, 60, id="nothing drains"),
        pytest.param(1e9, None, 60, id="at most a minute"),
    ],
)
def test_retry_after(excess_s: float, drain_tokens_per_s: float | None, expected: int) -> None:
    assert retry_after_s(snapshot(drain_tokens_per_s=drain_tokens_per_s), excess_s) == expected


# -- degradation -----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.0, 2.0), max_size=30), st.integers(0, 4))
def test_steps_are_reversible_and_do_not_flap(pressures: list[float], steps: int) -> None:
    level = 0
    for pressure in pressures:
        level = degradation_level(pressure, level, steps)
        assert degradation_level(pressure, level, steps) == level  # at rest at once
        swings = [level := degradation_level(at, level, steps) for at in [pressure, max(0.0, pressure - 0.05)] * 3]
        assert len(set(swings[1:])) == 1  # a swing below the hysteresis changes nothing
    assert degradation_level(0.0, level, steps) == 0
    assert degradation_level(1.0, level, steps) == steps


DEGRADING = replace(LOW, degrade=("max_tokens:64", NEVER_OFFLOAD, ONLY_OFFLOAD))


def test_degradation_comes_before_refusal_and_is_applied_where_it_helps() -> None:
    pressed = snapshot("low", classes=(DEGRADING,), queued=queued((0, 3_000)))
    answer = projected(pressed)  # 3 s of 4 s
    assert isinstance(answer, Admitted)
    assert (answer.steps, answer.level) == (("max_tokens:64",), 1)
    harder = replace(pressed, queued=queued((0, 3_400)))
    assert projected(harder).level == 2
    assert projected(replace(harder, request=Arrival("low", 10))).level == 2  # the pressure is not this prompt's


def test_a_step_that_would_make_the_request_late_is_left_out() -> None:
    """Only offloading is on, but the worker is behind; and there is none at all."""
    only = replace(LOW, degrade=(ONLY_OFFLOAD,))
    busy = replace(WORKER, queued_prefill_tokens=50_000)
    pressed = snapshot("low", classes=(only,), queued=queued((0, 3_000)))
    for workers_ in ((busy,), ()):
        answer = projected(replace(pressed, workers=workers_))
        assert isinstance(answer, Admitted)
        assert (answer.steps, answer.level) == ((), 1)
    near = replace(WORKER, queued_prefill_tokens=2_900)
    answer = projected(replace(pressed, workers=(near,)))
    assert isinstance(answer, Admitted)
    assert answer.steps == (ONLY_OFFLOAD,)


def test_a_class_that_is_not_there_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="class 'gold' is none of high, normal, low"):
        projected(snapshot("gold"))
