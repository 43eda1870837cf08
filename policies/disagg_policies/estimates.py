"""Predicted seconds to a first token, here and on a worker: arithmetic that several policies share.

All in seconds, from the moment of the decision. ``new`` is what somebody has to compute, ``n`` the whole prompt,
``held`` the prefix that D has already (its own cache or LMCache).
"""

from disagg_policies.snapshots import Snapshot, WorkerState


def local_ttft_s(snapshot: Snapshot) -> float:
    """D's own queue, then the prefill of ``new`` behind ``held``.

    ``queued requests * base_s + queued tokens * per_token_s + prefill(new, held)``, D's prefill model throughout.
    """
    decode, prompt = snapshot.decode, snapshot.prompt
    model = decode.prefill
    queue_s = decode.queued_requests * model.base_s + decode.queued_prefill_tokens * model.per_token_s
    return queue_s + model.seconds(prompt.uncached_tokens, prompt.held_tokens)


def decode_harm_s(snapshot: Snapshot) -> float:
    """Seconds that the local prefill of this prompt stalls D's running decodes, summed over them.

    Chunked or not, each running decode waits about as long as the prefill computes: ``batch * prefill(new, held)``.
    """
    decode, prompt = snapshot.decode, snapshot.prompt
    return decode.running_decodes * decode.prefill.seconds(prompt.uncached_tokens, prompt.held_tokens)


def queue_ahead_s(worker: WorkerState, priority: int) -> float:
    """Seconds until a worker would start a prompt of this priority: its whole queue, less what is overtaken.

    Really overtaken is only what has not begun. A prompt in the middle of its prefill is finished first, so this is
    short by at most one prefill.
    """
    if not worker.by_priority:
        return worker.queue_s
    overtaken = sum([tokens for other, tokens in worker.by_priority if other > priority])
    return max(0.0, worker.queue_s - overtaken * worker.s_per_token)


def remote_ttft_s(snapshot: Snapshot, worker: WorkerState, overlap_tokens: int, *, chunk_tokens: int) -> float:
    """Overhead, P's queue, P's prefill with most of the transfer beside it, the exposed rest of it, one step on D.

    ``overhead_s + queue ahead + max(prefill(n - overlap, overlap), hidden) + exposed + decode step``. Of the ``n - 1 -
    held`` tokens that travel (the last one never does, and what D holds does not), those of P's last step can leave
    only after it: ``exposed = setup_s + min(n - 1 - held, chunk) * link.s_per_token``. The others, ``hidden``, are on
    the wire while P computes.

    Args:
        overlap_tokens: Prefix of the prompt that the worker holds; it computes the rest, whatever D holds.
        chunk_tokens: Prompt tokens of one prefill step of the worker.
    """
    prompt, decode, link = snapshot.prompt, snapshot.decode, worker.link
    n = prompt.prompt_tokens
    overlap = min(overlap_tokens, n - 1)  # an engine computes at least the last token
    wire_tokens = max(0, prompt.uncached_tokens - 1)
    s_per_token = link.s_per_token
    prefill_s = worker.prefill.seconds(n - overlap, overlap)
    last_tokens = min(wire_tokens, chunk_tokens)
    hidden_s, exposed_s = (wire_tokens - last_tokens) * s_per_token, link.setup_s + last_tokens * s_per_token
    step_s = decode.decode.seconds(decode.running_decodes + 1, decode.decode_context_tokens)
    queue_s = queue_ahead_s(worker, prompt.priority)
    return worker.overhead_s + queue_s + max(prefill_s, hidden_s) + exposed_s + step_s
