"""Which prefill workers a prompt is offered to, best first: pure functions of a snapshot.

Every function has the same head: ``policy(snapshot, *, limit, prefill_queue_max, suspect_after_s, ...)``. They look
only at workers that are healthy, whose report is at most ``suspect_after_s`` old, that take a prompt of this length,
and whose queue is shorter than ``prefill_queue_max``; without any, the placement says why. ``limit`` is how many are
named: the second is asked if the first refuses.

Ties break by a hash of (request, decode engine), see ``ties``: many decode engines that see the same reports must not
herd onto one idle worker.
"""

from collections.abc import Sequence

from disagg_policies.snapshots import Placement, Snapshot, WorkerState
from disagg_policies.ties import seed, tie_breaker

TIE = 1e-9  # scores are in [0, 1]; what differs by less is rounding
UNLIMITED = 1 << 62
TAKEN = float("-inf")


def eligible(
    prompt_tokens: int,
    workers: Sequence[WorkerState],
    *,
    now_s: float = 0.0,
    prefill_queue_max: int | None = None,
    suspect_after_s: float = 1.0,
) -> list[int]:
    """Indices of the workers that may be asked.

    Args:
        prefill_queue_max: Requests; a worker at this length is not asked. The source is Dynamo's conditional policy.
        suspect_after_s: Age from which a report is not believed any more.
    """
    oldest_s = now_s - suspect_after_s
    queue_max = UNLIMITED if prefill_queue_max is None else prefill_queue_max
    return [
        index
        for index, w in enumerate(workers)
        if w.healthy and w.reported_s >= oldest_s and w.max_prompt_tokens >= prompt_tokens and w.requests < queue_max
    ]


def why_nobody(
    prompt_tokens: int, workers: Sequence[WorkerState], *, now_s: float = 0.0, suspect_after_s: float = 1.0
) -> str:
    """The word for counters where ``eligible`` is empty: the first requirement that leaves no worker."""
    if not workers:
        return "no_workers"
    present = [w for w in workers if w.reported_s >= now_s - suspect_after_s]
    healthy = [w for w in present if w.healthy]
    if not healthy:
        return "draining" if any(w.draining for w in present) else "no_healthy_worker"
    return "queue_full" if any(w.max_prompt_tokens >= prompt_tokens for w in healthy) else "prompt_too_long"


def score(
    snapshot: Snapshot,
    *,
    prefix_cache_weight: float = 10.0,
    queue_length_weight: float = 1.5,
    decode_load_weight: float = 0.5,
    link_weight: float = 1.0,
    enable_hotspot_prevention: bool = True,
    limit: int = 2,
    prefill_queue_max: int | None = None,
    suspect_after_s: float = 1.0,
) -> Placement:
    """The highest weighted sum of four factors, each between 0 and 1, divided by the sum of the weights.

    With ``n`` = prompt tokens and ``work_s = n * D's prefill seconds per token`` (the yardstick: the same for every
    worker, so that one worker's failure or load never changes how two others compare)::

        prefix    overlap / n
        queue     work_s / (work_s + wait_s)   wait_s = (queued + in flight + n) tokens / its tokens per second
        decode    1 - (kv_usage + running / (running + 16)) / 2
        link      work_s / (work_s + wire_s)   wire_s = setup_s + (n - held by D) * wire bytes per token / bytes per s

    Hotspot prevention: with ``queue_s`` = (queued + in flight) tokens / tokens per second, and a worker's fair share
    = the mean ``queue_s`` of all other workers (failed ones too: what they held has to go somewhere), a worker above
    it keeps ``max(0, 1 - (queue_s - fair_s) / (fair_s + work_s))`` of its prefix factor: nothing once it is one such
    prompt beyond twice its share. On an otherwise idle fleet that is where recomputing elsewhere is as fast as
    waiting.

    Weights and the name of the switch are Dynamo users' (``split_policy``); their ratio 10 : 1.5 is AIBrix's, whose
    own comment says that on raw counts it makes a magnet for bursts.
    """
    n = max(1, snapshot.prompt.prompt_tokens)
    workers, overlaps = snapshot.workers, snapshot.overlap_tokens
    work_s = n * snapshot.decode.prefill.per_token_s or TIE
    wire_tokens = snapshot.prompt.uncached_tokens
    total_weight = (prefix_cache_weight + queue_length_weight + decode_load_weight + link_weight) or 1.0
    prefix_weight = prefix_cache_weight / total_weight / n
    queue_weight = queue_length_weight / total_weight * work_s
    half_decode_weight = decode_load_weight / total_weight / 2
    link_weight = link_weight / total_weight * work_s
    oldest_s = snapshot.now_s - suspect_after_s
    queue_max = UNLIMITED if prefill_queue_max is None else prefill_queue_max
    others = len(workers) - 1
    prevent = enable_hotspot_prevention and others > 0
    total_s = sum([w.queue_s for w in workers]) if prevent and overlaps else 0.0

    # one pass and plain arithmetic: this loop is most of a decision's time
    scores: list[float] = []
    add = scores.append
    for w, overlap in zip(workers, overlaps or (0,) * len(workers), strict=True):
        if not w.healthy or w.reported_s < oldest_s or w.max_prompt_tokens < n or w.requests >= queue_max:
            add(TAKEN)  # not ``eligible``
            continue
        queue_s = w.queue_s
        value = (
            queue_weight / (work_s + queue_s + n * w.s_per_token)
            + half_decode_weight * (2.0 - w.busy)
            + link_weight / (work_s + w.wire_setup_s + wire_tokens * w.wire_s_per_token)
        )
        if overlap:
            bonus = prefix_weight * overlap
            if prevent:
                fair_s = (total_s - queue_s) / others
                if queue_s > fair_s:
                    bonus *= max(0.0, 1.0 - (queue_s - fair_s) / (fair_s + work_s))
            value += bonus
        add(value)
    return _best(snapshot, scores, limit, "score") or _nobody(snapshot, suspect_after_s)


def least_loaded(
    snapshot: Snapshot, *, limit: int = 2, prefill_queue_max: int | None = None, suspect_after_s: float = 1.0
) -> Placement:
    """The shortest queue in seconds, (queued + in flight) tokens / tokens per second; then the fewest requests."""
    fit = _eligible_in(snapshot, prefill_queue_max, suspect_after_s)
    if not fit:
        return _nobody(snapshot, suspect_after_s)
    return Placement(by_load(snapshot.prompt.request_id, snapshot.decode.engine, fit)[:limit], "least_loaded")


def by_load(request_id: str, decode_engine: str, workers: Sequence[WorkerState]) -> tuple[str, ...]:
    """Names, the least loaded first: queue in seconds, then requests, then the tie's hash."""
    tie = tie_breaker(request_id, decode_engine)
    order = sorted(workers, key=lambda w: (w.queue_s, w.requests, tie(w.worker)))
    return tuple([w.worker for w in order])


def round_robin(
    snapshot: Snapshot, *, limit: int = 2, prefill_queue_max: int | None = None, suspect_after_s: float = 1.0
) -> Placement:
    """Workers in turn: eligible worker number ``(turn + hash(decode engine)) mod count``, then the ones after it.

    ``turn`` is in the previous state; the hash lets many decode engines begin at different workers.
    """
    fit = _eligible_in(snapshot, prefill_queue_max, suspect_after_s)
    if not fit:
        return _nobody(snapshot, suspect_after_s)
    start = (snapshot.previous.turn + seed("", snapshot.decode.engine)) % len(fit)
    order = fit[start:] + fit[:start]
    return Placement(tuple([w.worker for w in order[:limit]]), "round_robin")


def power_of_two(
    snapshot: Snapshot, *, limit: int = 2, prefill_queue_max: int | None = None, suspect_after_s: float = 1.0
) -> Placement:
    """Of two workers drawn by the hash of (request, decode engine), the less loaded first.

    For many workers and reports that are old when they are read: the choice between two random ones is nearly as even
    as the choice among all, and nobody's stale report attracts everybody (Mitzenmacher, 2001).
    """
    fit = _eligible_in(snapshot, prefill_queue_max, suspect_after_s)
    if not fit:
        return _nobody(snapshot, suspect_after_s)
    request_id, engine = snapshot.prompt.request_id, snapshot.decode.engine
    tie = tie_breaker(request_id, engine)
    drawn = sorted(fit, key=lambda w: tie(w.worker))
    order = (*by_load(request_id, engine, drawn[:2]), *(w.worker for w in drawn[2:limit]))
    return Placement(order[:limit], "power_of_two")


def _eligible_in(snapshot: Snapshot, prefill_queue_max: int | None, suspect_after_s: float) -> list[WorkerState]:
    indices = eligible(
        snapshot.prompt.prompt_tokens,
        snapshot.workers,
        now_s=snapshot.now_s,
        prefill_queue_max=prefill_queue_max,
        suspect_after_s=suspect_after_s,
    )
    return [snapshot.workers[index] for index in indices]


def _nobody(snapshot: Snapshot, suspect_after_s: float) -> Placement:
    tokens = snapshot.prompt.prompt_tokens
    reason = why_nobody(tokens, snapshot.workers, now_s=snapshot.now_s, suspect_after_s=suspect_after_s)
    return Placement((), reason)


def _best(snapshot: Snapshot, scores: list[float], limit: int, policy: str) -> Placement | None:
    """The ``limit`` highest scores; those within ``TIE`` of a group's highest are ordered by hash.

    Args:
        scores: Of the snapshot's workers; ``TAKEN`` for one that may not be asked.
    """
    workers = snapshot.workers
    left = scores.copy()
    chosen: list[int] = []
    while len(chosen) < limit and (top := max(left, default=TAKEN)) != TAKEN:
        first = left.index(top)
        left[first] = TAKEN
        if max(left) < top - TIE:
            chosen.append(first)
            continue
        group = [first, *(i for i, score in enumerate(left) if score >= top - TIE)]
        tie = tie_breaker(snapshot.prompt.request_id, snapshot.decode.engine)
        chosen += sorted(group, key=lambda i: tie(workers[i].worker))
        for i in group:
            left[i] = TAKEN
    if not chosen:
        return None
    del chosen[limit:]
    return Placement(tuple([workers[i].worker for i in chosen]), policy, tuple([scores[i] for i in chosen]))
