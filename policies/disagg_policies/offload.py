"""Whether a prompt is prefilled here or on a prefill worker: pure functions of snapshots.

Reasons to stay, in the order in which they are looked at:

    short_prompt       too few tokens to compute, even without any cache
    cached_enough      a longer prompt, but what is left to compute is too little, or enough of it is cached
    no_workers         none is configured
    draining           none is healthy, and one of them is about to leave
    no_healthy_worker  none is connected, compatible and heard of within the last second
    prompt_too_long    no healthy worker takes a prompt of this length
    queue_full         no such worker has room in its queue
    kv_budget          too much KV is held here for transfers already          (latency)
    deadline           the worker would be too late, this engine would not     (latency)
    local_faster       by the estimates                                        (latency)

Reasons to go: ``over_threshold``, ``remote_faster``, and ``only_offload`` where admission degraded the request.
"""

from collections.abc import Sequence

from disagg_policies.estimates import decode_harm_s, local_ttft_s, remote_ttft_s
from disagg_policies.placement import by_load, eligible, least_loaded, why_nobody
from disagg_policies.snapshots import Local, Offload, Placement, PolicyState, Prompt, Snapshot, WorkerState

__all__ = ["Local", "Offload", "Prompt", "WorkerState", "latency", "stays", "threshold"]


def stays(
    prompt: Prompt, *, prompt_length_threshold: int = 1, min_cache_hit_ratio: float | None = None
) -> Local | None:
    """The answer that needs no look at any worker, or None.

    Args:
        prompt_length_threshold: Tokens; a prompt with at most as many uncached ones stays. At least one token is
            always computed here, hence 1.
        min_cache_hit_ratio: Held / prompt tokens from which a prompt stays, or None.
    """
    if prompt.uncached_tokens <= prompt_length_threshold:
        return Local("cached_enough" if prompt.prompt_tokens > prompt_length_threshold else "short_prompt")
    if min_cache_hit_ratio is not None and prompt.held_tokens >= min_cache_hit_ratio * prompt.prompt_tokens:
        return Local("cached_enough")
    return None


def threshold(
    prompt: Prompt,
    workers: Sequence[WorkerState],
    *,
    prompt_length_threshold: int,
    prefill_queue_max: int,
    decode_engine: str = "",
    min_cache_hit_ratio: float | None = None,
    placement: Placement | None = None,
    now_s: float = 0.0,
    suspect_after_s: float = 1.0,
) -> Local | Offload:
    """Offload exactly when ``prompt_tokens - cached_tokens > prompt_length_threshold`` and a worker has room.

    ``cached_tokens`` is the longer of D's own cached prefix and LMCache's. Having room means healthy, heard of, made
    for prompts of this length, and ``queued + in flight requests < prefill_queue_max``.

    Args:
        prompt_length_threshold: Tokens; the source is Dynamo's first conditional policy (ai-dynamo/dynamo#98).
        prefill_queue_max: Requests; a worker at this length is not asked.
        min_cache_hit_ratio: A prompt cached to at least this share of its tokens stays, or None.
        placement: Whom to ask, in which order. Without it the two least loaded, ties by hash of (request, D).
    """
    stay = stays(prompt, prompt_length_threshold=prompt_length_threshold, min_cache_hit_ratio=min_cache_hit_ratio)
    if stay is not None:
        return stay
    tokens = prompt.prompt_tokens
    if placement is None:
        fit = eligible(
            tokens, workers, now_s=now_s, prefill_queue_max=prefill_queue_max, suspect_after_s=suspect_after_s
        )
        if not fit:
            return Local(why_nobody(tokens, workers, now_s=now_s, suspect_after_s=suspect_after_s))
        names = by_load(prompt.request_id, decode_engine, [workers[index] for index in fit])[:2]
        return Offload(names, "over_threshold")
    if not placement.workers:
        return Local(placement.reason)
    room = _with_room(placement.workers, workers, prefill_queue_max)
    return Offload(room, "over_threshold") if room else Local("queue_full")


def latency(
    snapshot: Snapshot,
    *,
    decode_harm_weight: float = 0.1,
    hysteresis: float = 0.05,
    chunk_tokens: int = 2048,
    prompt_length_threshold: int = 1,
    min_cache_hit_ratio: float | None = None,
    prefill_queue_max: int | None = None,
) -> Local | Offload:
    """Offload exactly when the predicted remote TTFT is below the predicted local cost; a tie stays local.

    ::

        local cost = local TTFT + decode_harm_weight * harm        harm = running decodes * local prefill seconds
        remote     < local cost * (1 - h)                          h = hysteresis after a local decision, else 0

    The estimates' formulas stand in ``estimates``: seconds, from fitted models. The remote one is that of the first
    worker of the placement. Once a prompt of a size (uncached tokens, by powers of two) stayed, the worker has to win
    by ``hysteresis`` before the next one of that size goes; it goes on winning as long as it is faster at all.

    Args:
        decode_harm_weight: Seconds of this prompt's TTFT that one second of stall of one running decode is worth.
            0 looks at this prompt only; 1 counts everybody's seconds alike.
        hysteresis: Share of the local cost, above the relative noise of the estimates.
        chunk_tokens: Prompt tokens of one prefill step of a worker.
        prompt_length_threshold: Uncached tokens up to which nothing is compared: stays. Tokens.
        min_cache_hit_ratio: A prompt cached to at least this share of its tokens stays, or None.
        prefill_queue_max: Requests; without it, the placement has looked at the queues.
    """
    prompt, decode = snapshot.prompt, snapshot.decode
    stay = stays(prompt, prompt_length_threshold=prompt_length_threshold, min_cache_hit_ratio=min_cache_hit_ratio)
    if stay is not None:
        return stay
    placement = snapshot.placement
    if placement is None:
        placement = least_loaded(snapshot, prefill_queue_max=prefill_queue_max)
    if not placement.workers:
        return Local(placement.reason)
    room = placement.workers
    if prefill_queue_max is not None:
        room = _with_room(room, snapshot.workers, prefill_queue_max)
        if not room:
            return Local("queue_full")

    worker, overlap = _find(snapshot, room[0])
    local_s, harm_s = local_ttft_s(snapshot), decode_harm_s(snapshot)
    remote_s = remote_ttft_s(snapshot, worker, overlap, chunk_tokens=chunk_tokens)
    budget = decode.held_kv_budget_tokens
    if budget is not None and decode.held_kv_tokens and decode.held_kv_tokens + prompt.uncached_tokens > budget:
        return Local("kv_budget", local_s, remote_s, harm_s)
    if prompt.only_offload:
        return Offload(room, "only_offload", local_s, remote_s, harm_s)
    margin = hysteresis if _stayed(snapshot.previous, prompt) else 0.0
    if not remote_s < (local_s + decode_harm_weight * harm_s) * (1.0 - margin):
        return Local("local_faster", local_s, remote_s, harm_s)
    if prompt.deadline_s is not None and local_s <= prompt.deadline_s < remote_s:
        return Local("deadline", local_s, remote_s, harm_s)
    return Offload(room, "remote_faster", local_s, remote_s, harm_s)


def _stayed(previous: PolicyState, prompt: Prompt) -> bool:
    return bool(previous.local_sizes >> prompt.uncached_tokens.bit_length() & 1)


def _with_room(names: tuple[str, ...], workers: Sequence[WorkerState], prefill_queue_max: int) -> tuple[str, ...]:
    full = {w.worker for w in workers if w.requests >= prefill_queue_max}
    return tuple([name for name in names if name not in full]) if full else names


def _find(snapshot: Snapshot, name: str) -> tuple[WorkerState, int]:
    """The worker and its overlap.

    Raises:
        ValueError: A placement named a worker that the snapshot does not know.
    """
    for index, worker in enumerate(snapshot.workers):
        if worker.worker == name:
            return worker, snapshot.overlap_tokens[index] if snapshot.overlap_tokens else 0
    raise ValueError(f"placement names {name!r}, which is none of {len(snapshot.workers)} workers")
