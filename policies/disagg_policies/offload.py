"""Whether a prompt is prefilled here or on a prefill worker, and on which: pure functions of snapshots."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request at the moment of the decision.

    Attributes:
        request_id: Only breaks ties, so that equal workers share equal work.
        cached_tokens: Prefix that the decode engine holds in its own cache.
    """

    request_id: str
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One prefill worker as the decode engine knows it.

    Attributes:
        queued_requests: Requests waiting there, its own report plus what was offered to it since.
        max_prompt_tokens: Longest prompt it takes.
    """

    worker: str
    healthy: bool
    queued_requests: int
    max_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Local:
    """Prefill on the decode engine; ``reason`` is a word for counters."""

    reason: str


@dataclass(frozen=True, slots=True)
class Offload:
    """Offer to ``workers`` in this order: the second is asked only if the first refuses."""

    workers: tuple[str, ...]
    reason: str


def threshold(
    prompt: Prompt,
    workers: Sequence[WorkerState],
    *,
    prompt_length_threshold: int,
    prefill_queue_max: int,
    decode_engine: str = "",
) -> Local | Offload:
    """Offload exactly when ``prompt_tokens - cached_tokens > prompt_length_threshold`` and a worker has room.

    Workers are ordered by queue length; ties by a hash of (request, decode engine), so that many decode engines
    do not herd onto one idle worker. At most two are named.

    Args:
        prompt_length_threshold: Tokens; the source is Dynamo's first conditional policy (ai-dynamo/dynamo#98).
        prefill_queue_max: Requests; a worker at this length is not asked.
    """
    if prompt.prompt_tokens - prompt.cached_tokens <= prompt_length_threshold:
        return Local("cached_enough" if prompt.prompt_tokens > prompt_length_threshold else "short_prompt")
    if not workers:
        return Local("no_workers")
    healthy = [w for w in workers if w.healthy]
    if not healthy:
        return Local("no_healthy_worker")
    fitting = [w for w in healthy if prompt.prompt_tokens <= w.max_prompt_tokens]
    if not fitting:
        return Local("prompt_too_long")
    free = [w for w in fitting if w.queued_requests < prefill_queue_max]
    if not free:
        return Local("queue_full")

    def order(worker: WorkerState) -> tuple[int, bytes]:
        key = f"{prompt.request_id}|{decode_engine}|{worker.worker}".encode()
        return worker.queued_requests, hashlib.blake2b(key, digest_size=8).digest()

    return Offload(tuple(w.worker for w in sorted(free, key=order)[:2]), "over_threshold")
