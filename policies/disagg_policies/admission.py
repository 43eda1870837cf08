"""Whether a request is served at all, before any work is done for it: pure functions of a snapshot.

Reasons to admit:

    remote_done       another engine has computed its prompt already
    fits              predicted within its SLO
    long              later than its SLO, but by its own length, not because of others
    late              predicted too late, and nobody asked to refuse for that
    lower_class_fits  predicted too late, but a lower class would be served with the same prompt
    protected         predicted too late, and of the highest of several classes       (current_queue)

Reasons to refuse, the first two with 503 instead of 429:

    draining, no_capacity
    fair_share        its key has had more than its share while others of its class wait
    ttft, tpot        predicted to miss this SLO
    low_priority      of the lowest of several classes, and above its threshold
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from disagg_policies.admission_snapshots import (
    NEVER_OFFLOAD,
    ONLY_OFFLOAD,
    Admission,
    AdmissionSnapshot,
    Admitted,
    QueuedWork,
    Refused,
    ServiceClass,
)
from disagg_policies.estimates import local_ttft_s, queue_ahead_s, remote_ttft_s
from disagg_policies.snapshots import Prompt, Snapshot, WorkerState

LEAST_RETRY_S, LONGEST_RETRY_S = 1, 60
MOST_URGENT = 0.9  # share of the speed that more urgent requests are believed to take at most
STRETCH = 1.1  # a request this much slower than alone is not late because of others


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a request would see in one class; see ``forecast``.

    Attributes:
        local_s, remote_s: Seconds to the first token either way; ``remote_s`` is None without a worker.
        wait_s: Part of the shorter way that others are to blame for, seconds.
        tpot_s: Mean seconds per further token.
        alone_s, alone_tpot_s: The same on idle engines.
        goes_remote: It will be prefilled remotely, whichever way is shorter.
    """

    local_s: float
    remote_s: float | None
    wait_s: float
    tpot_s: float
    alone_s: float
    alone_tpot_s: float
    goes_remote: bool = False

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token, the shorter way where there is a choice."""
        if self.remote_s is None:
            return self.local_s
        return self.remote_s if self.goes_remote else min(self.local_s, self.remote_s)


def projected(
    snapshot: AdmissionSnapshot,
    *,
    reject_on_slo_violation: bool = True,
    low_priority_threshold_s: float | None = None,
    degrade_from: float = 0.7,
    hysteresis: float = 0.1,
    chunk_tokens: int = 2048,
) -> Admission:
    """Refuse what others would make miss its class's TTFT or TPOT, and every lower class's with it.

    ::

        late by TTFT   ttft > max(ttft_slo, 1.1 * ttft alone)      late by TPOT   tpot > max(tpot_slo, 1.1 * tpot alone)

    with the estimates of ``forecast``. What is too long for its SLO even on an idle engine is not refused for that: it
    would never be served. What is late in its own class, but not in a lower one, is served: the lower one would be.

    Args:
        reject_on_slo_violation: Otherwise what is late is served, unless the threshold below refuses it.
        low_priority_threshold_s: The lowest of several classes is refused above it, in place of a longer SLO.
        degrade_from: Pressure at which a class's first degradation step comes on; see ``degradation_level``.
        hysteresis: How far the pressure has to fall below a step's beginning until the step goes off.
        chunk_tokens: Prompt tokens of one prefill step of a worker.
    """
    early = _without_forecast(snapshot)
    if early is not None:
        return early
    own_class = snapshot.class_named(snapshot.request.service_class)
    own = forecast(snapshot, own_class, chunk_tokens=chunk_tokens)
    pressure = _pressure(own, own_class)
    level = degradation_level(
        pressure, snapshot.level, len(own_class.degrade), start=degrade_from, hysteresis=hysteresis
    )
    highest, lowest = snapshot.classes[0].priority, snapshot.classes[-1].priority

    def missed_by(seen: Forecast, promised: ServiceClass) -> str:
        threshold_s = low_priority_threshold_s if promised.priority == lowest > highest else None
        if threshold_s is not None and seen.ttft_s > max(threshold_s, STRETCH * seen.alone_s):
            return "low_priority"
        return _missed(seen, promised) if reject_on_slo_violation else ""

    missed = missed_by(own, own_class)
    if not missed:
        reason = "fits"
        if _missed(own, own_class):
            reason = "late"
        elif own.ttft_s > own_class.ttft_slo_s:
            reason = "long"
    elif _some_lower_class(
        snapshot, own_class, lambda lower: not missed_by(forecast(snapshot, lower, chunk_tokens=chunk_tokens), lower)
    ):
        reason = "lower_class_fits"
    else:
        if missed == "tpot":
            excess_s = _tpot_excess_s(snapshot, own, own_class)
        else:
            limit_s = low_priority_threshold_s if missed == "low_priority" else own_class.ttft_slo_s
            excess_s = own.ttft_s - max(limit_s or 0.0, STRETCH * own.alone_s)
        return Refused(missed, retry_after_s(snapshot, excess_s), False, level, own.ttft_s, own.tpot_s, pressure)
    return Admitted(reason, _applicable(own_class, own, level), level, own.ttft_s, own.tpot_s, pressure)


def current_queue(
    snapshot: AdmissionSnapshot,
    *,
    reject_on_slo_violation: bool = True,
    low_priority_threshold_s: float | None = 0.5,
    degrade_from: float = 0.7,
    hysteresis: float = 0.1,
) -> Admission:
    """The rule by the queues of this moment; it oscillates (see ``benchmarks/oscillation.py``), ``projected`` does not.

    ::

        ttft = queued prefills * mean prefill seconds + running decodes * mean decode seconds

    Prefills are queued here or at workers. Above its class's SLO a request is refused, unless it is of the highest of
    several classes; one of the lowest also above ``low_priority_threshold_s``. Nothing here knows how long this prompt
    is, what is being prefilled elsewhere, or what will have ended by the time it lands.
    """
    early = _without_forecast(snapshot)
    if early is not None:
        return early
    own_class = snapshot.class_named(snapshot.request.service_class)
    queued = sum(work.requests for work in (*snapshot.queued, *snapshot.reserved))
    queued += sum(worker.queued_requests + worker.in_flight_requests for worker in snapshot.workers)
    ttft_s = queued * snapshot.mean_prefill_s + snapshot.decode.running_decodes * snapshot.mean_decode_s
    pressure = ttft_s / own_class.ttft_slo_s
    level = degradation_level(
        pressure, snapshot.level, len(own_class.degrade), start=degrade_from, hysteresis=hysteresis
    )
    highest, lowest = snapshot.classes[0].priority, snapshot.classes[-1].priority

    def limit_s(of: ServiceClass) -> tuple[float, str]:
        limit = of.ttft_slo_s if reject_on_slo_violation else math.inf
        threshold_s = low_priority_threshold_s if of.priority == lowest > highest else None
        if threshold_s is not None and threshold_s < limit:
            return threshold_s, "low_priority"
        return limit, "ttft"

    limit, why = limit_s(own_class)
    if ttft_s <= limit:
        reason = "late" if ttft_s > own_class.ttft_slo_s else "fits"
    elif own_class.priority == highest < lowest:
        reason = "protected"
    elif _some_lower_class(snapshot, own_class, lambda lower: ttft_s <= limit_s(lower)[0]):
        reason = "lower_class_fits"
    else:
        return Refused(why, retry_after_s(snapshot, ttft_s - limit), False, level, ttft_s, None, pressure)
    reachable = any(worker.healthy for worker in snapshot.workers)
    steps = [step for step in own_class.degrade[:level] if reachable or step != ONLY_OFFLOAD]
    return Admitted(reason, tuple(steps), level, ttft_s, None, pressure)


def forecast(snapshot: AdmissionSnapshot, service_class: ServiceClass, *, chunk_tokens: int = 2048) -> Forecast:
    """What this request would see in ``service_class``.

    *TTFT*: local or remote as in ``estimates``, the shorter one unless the snapshot says which way it will go; in
    either queue only what the class cannot overtake: equal or more urgent priority, everything where nobody reorders.
    What is on its way to the scheduler is ahead in both. Of the speed at which a queue is worked off, more urgent
    requests that go on arriving take their share::

        queue wait  = queue ahead / (1 - min(0.9, tokens per second of more urgent classes / tokens per second in all))

    On top of either way, the wait for KV space and for a place in the batch::

        kv wait     = max(0, tokens ahead + prompt - capacity * (1 - usage)) / capacity * decode_lasts_s
        batch wait  = max(0, running + requests ahead + 1 - max_running) / max_running * decode_lasts_s

    *TPOT*: a decode step of the batch at the moment when this prefill will end, and what prompts add to steps now.
    Each running decode lasts ``decode_lasts_s`` and they began evenly, so of ``running`` are left
    ``running * (1 - own / decode_lasts_s)``, where ``own`` are the seconds of this prefill alone, the shorter way. To
    them come this one and those before it, here and elsewhere, that the class cannot overtake; but they come one after
    another, so that at most so many of them decode at one time (Little's law)::

        joining = min(requests before it, decode_lasts_s * prefills per second, here and at the workers)

    That more of the *running* decodes end while this request waits for others is left out on purpose: a longer queue
    must not make anybody admissible.
    """
    request, decode = snapshot.request, snapshot.decode
    ahead = work_ahead(snapshot, service_class)
    coming = _ahead(snapshot.reserved, service_class, snapshot.reorders)
    new_tokens = max(1, request.prompt_tokens - request.cached_tokens)  # an engine computes at least the last token
    prompt = Prompt("", request.prompt_tokens, request.prompt_tokens - new_tokens, priority=service_class.priority)
    seen = Snapshot(
        prompt,
        replace(decode, queued_requests=ahead.requests, queued_prefill_tokens=ahead.tokens),
        snapshot.workers,
    )
    model = decode.decode
    usable = [w for w in snapshot.workers if w.healthy and request.prompt_tokens <= w.max_prompt_tokens]
    above_tokens = snapshot.offload_above_tokens
    goes_remote = above_tokens is not None and new_tokens > above_tokens and bool(usable)
    stretch = _stretch(snapshot, service_class, usable, local=not goes_remote)
    space_s = _space_wait_s(snapshot, ahead)
    alone_s = decode.prefill.seconds(new_tokens, prompt.cached_tokens)
    local_s = (local_ttft_s(seen) - alone_s) * stretch + alone_s + space_s
    wait_s = math.inf if goes_remote else local_s - alone_s
    alone_s = math.inf if goes_remote else alone_s
    remote_s: float | None = None
    step_s = model.seconds(decode.running_decodes + 1, decode.decode_context_tokens)
    for worker in usable if above_tokens is None or goes_remote else ():
        through_s = remote_ttft_s(seen, worker, 0, chunk_tokens=chunk_tokens)
        queue_s = queue_ahead_s(worker, service_class.priority)
        alone_s = min(alone_s, through_s - queue_s - step_s)
        waits_s = (queue_s + coming.tokens * worker.s_per_token) * stretch + space_s
        through_s += waits_s - queue_s
        remote_s = through_s if remote_s is None else min(remote_s, through_s)
        wait_s = min(wait_s, waits_s)

    left = max(0.0, 1.0 - alone_s / snapshot.decode_lasts_s) if snapshot.decode_lasts_s > 0 else 0.0
    joining, joining_tokens = _joining(snapshot, service_class, ahead, usable)
    batch = decode.running_decodes * left + joining
    context = decode.decode_context_tokens * left + joining_tokens
    tpot_s = model.base_s + model.per_request_s * (batch + 1) + snapshot.decode_stall_s
    tpot_s += model.per_context_token_s * (context + request.prompt_tokens)
    alone_tpot_s = model.seconds(1, request.prompt_tokens)
    return Forecast(local_s, remote_s, wait_s, tpot_s, alone_s, alone_tpot_s, goes_remote)


def _joining(
    snapshot: AdmissionSnapshot, service_class: ServiceClass, ahead: QueuedWork, usable: Sequence[WorkerState]
) -> tuple[float, float]:
    """(requests, tokens of their prompts) of those before it that decode when it does; see ``forecast``."""
    landing = _ahead(snapshot.landing, service_class, snapshot.reorders)
    requests, tokens = float(ahead.requests + landing.requests), float(ahead.tokens + landing.tokens)
    if snapshot.mean_prefill_s <= 0:
        return requests, tokens
    per_token_s = snapshot.decode.prefill.per_token_s
    engines = 1.0 + sum([per_token_s / worker.s_per_token for worker in usable])
    most = engines * snapshot.decode_lasts_s / snapshot.mean_prefill_s
    most_tokens = most * snapshot.mean_prompt_tokens if snapshot.mean_prompt_tokens else math.inf
    return min(requests, most), min(tokens, most_tokens)


def _stretch(
    snapshot: AdmissionSnapshot, service_class: ServiceClass, usable: Sequence[WorkerState], *, local: bool
) -> float:
    """How much longer a queue lasts because more urgent requests go on arriving."""
    if not snapshot.reorders:
        return 1.0
    urgent = sum([rate for priority, rate in snapshot.arriving if priority < service_class.priority])
    if not urgent:
        return 1.0
    speed = sum([1.0 / worker.s_per_token for worker in usable])
    per_token_s = snapshot.decode.prefill.per_token_s
    if local and per_token_s > 0:
        speed += 1.0 / per_token_s
    return 1.0 / (1.0 - min(MOST_URGENT, urgent / speed)) if speed > 0 else 1.0


def work_ahead(snapshot: AdmissionSnapshot, service_class: ServiceClass) -> QueuedWork:
    """What ``service_class`` cannot overtake of the local queue, and of what is on its way to it."""
    queued = _ahead(snapshot.queued, service_class, snapshot.reorders)
    coming = _ahead(snapshot.reserved, service_class, snapshot.reorders)
    return QueuedWork(service_class.priority, queued.requests + coming.requests, queued.tokens + coming.tokens)


def _ahead(works: Sequence[QueuedWork], service_class: ServiceClass, reorders: bool) -> QueuedWork:
    requests = tokens = 0
    for work in works:
        if work.priority <= service_class.priority or not reorders:
            requests += work.requests
            tokens += work.tokens
    return QueuedWork(service_class.priority, requests, tokens)


def degradation_level(
    pressure: float, previous: int, steps: int, *, start: float = 0.7, hysteresis: float = 0.1
) -> int:
    """How many of a class's ``steps`` are on: step ``k`` begins at ``start + k * (1 - start) / steps``.

    A step that is on stays on until the pressure is ``hysteresis`` below its beginning; at pressure 0 none is on.
    """
    level = 0
    for step in range(steps):
        begins = start + step * (1.0 - start) / steps
        if pressure >= (begins if step >= previous else max(begins - hysteresis, 1e-9)):
            level = step + 1
    return level


def retry_after_s(snapshot: AdmissionSnapshot, excess_s: float) -> int:
    """Whole seconds, 1 to 60, until work of ``excess_s`` has drained.

    ``excess_s`` counts at the speed of the prefill model; where the queue really loses ``drain_tokens_per_s``, it takes
    ``1 / (per_token_s * drain_tokens_per_s)`` times as long.
    """
    slowdown, drain = 1.0, snapshot.drain_tokens_per_s
    if drain is not None:
        per_token_s = snapshot.decode.prefill.per_token_s
        slowdown = max(1.0, 1.0 / (per_token_s * drain)) if drain * per_token_s > 0 else math.inf
    seconds = excess_s * slowdown if excess_s > 0 else 0.0
    return LONGEST_RETRY_S if seconds >= LONGEST_RETRY_S else max(LEAST_RETRY_S, math.ceil(seconds))


def _without_forecast(snapshot: AdmissionSnapshot) -> Admission | None:
    """The answers that need no estimate."""
    if snapshot.request.remote_prefill_done:
        return Admitted("remote_done", level=snapshot.level)
    if snapshot.draining:
        return Refused("draining", LONGEST_RETRY_S, True, snapshot.level)
    if not snapshot.serves:
        return Refused("no_capacity", LONGEST_RETRY_S, True, snapshot.level)
    if snapshot.overused:
        return Refused("fair_share", LEAST_RETRY_S, False, snapshot.level)
    return None


def _some_lower_class(snapshot: AdmissionSnapshot, own: ServiceClass, admitted: Callable[[ServiceClass], bool]) -> bool:
    return any(lower.priority > own.priority and admitted(lower) for lower in snapshot.classes)


def _missed(seen: Forecast, promised: ServiceClass) -> str:
    """The SLO that others would make this request miss, or ""."""
    if seen.ttft_s > _ttft_limit_s(seen, promised):
        return "ttft"
    if promised.tpot_slo_s is not None and seen.tpot_s > max(promised.tpot_slo_s, STRETCH * seen.alone_tpot_s):
        return "tpot"
    return ""


def _ttft_limit_s(seen: Forecast, promised: ServiceClass) -> float:
    return max(promised.ttft_slo_s, STRETCH * seen.alone_s)


def _tpot_excess_s(snapshot: AdmissionSnapshot, seen: Forecast, promised: ServiceClass) -> float:
    """Seconds until enough decodes have ended, at the rate at which they do."""
    assert promised.tpot_slo_s is not None
    base_s = snapshot.decode.decode.base_s
    if promised.tpot_slo_s <= base_s or seen.tpot_s <= base_s:
        return snapshot.decode_lasts_s
    return snapshot.decode_lasts_s * (seen.tpot_s - promised.tpot_slo_s) / (seen.tpot_s - base_s)


def _pressure(seen: Forecast, promised: ServiceClass) -> float:
    """Share of the SLO that others use up, the worse of the two; 0 on an idle engine, whatever the prompt."""
    pressure = seen.wait_s / promised.ttft_slo_s
    if promised.tpot_slo_s is not None and promised.tpot_slo_s > seen.alone_tpot_s:
        others_s = seen.tpot_s - seen.alone_tpot_s
        pressure = max(pressure, others_s / (promised.tpot_slo_s - seen.alone_tpot_s))
    return max(0.0, pressure)


def _applicable(promised: ServiceClass, seen: Forecast, level: int) -> tuple[str, ...]:
    """The steps that are on and do not themselves make this request late."""
    steps = []
    for step in promised.degrade[:level]:
        if step == NEVER_OFFLOAD:
            through_s: float | None = seen.local_s
        elif step == ONLY_OFFLOAD:
            through_s = seen.remote_s
        else:
            through_s = 0.0
        if through_s is not None and through_s <= _ttft_limit_s(seen, promised):
            steps.append(step)
    return tuple(steps)


def _space_wait_s(snapshot: AdmissionSnapshot, ahead: QueuedWork) -> float:
    """Seconds until decodes that end make room, in the KV cache and in the batch; the longer wait."""
    wait_s = 0.0
    capacity, usage = snapshot.kv_capacity_tokens, snapshot.decode.kv_usage
    if capacity:
        needed = ahead.tokens + snapshot.request.prompt_tokens - capacity * (1.0 - min(1.0, usage))
        wait_s = max(0.0, needed / capacity)
    if snapshot.max_running:
        running = snapshot.decode.running_decodes + ahead.requests + 1 - snapshot.max_running
        wait_s = max(wait_s, running / snapshot.max_running)
    return wait_s * snapshot.decode_lasts_s
