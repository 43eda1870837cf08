"""Feeds the policies with what this decode engine knows, and the latency models with what became of their answers."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from disagg_plugin.config import DisaggSettings
from disagg_plugin.control.decode_port import DecodePort, PromptView
from disagg_plugin.control.decode_transfer import Transfer
from disagg_plugin.control.load import LoadTracker
from disagg_plugin.hookspecs import PolicyParameters
from disagg_plugin.plugins import choose, load_plugins
from disagg_plugin.serving.decision_record import DecisionRecord
from disagg_plugin.serving.decisions import Decider
from disagg_plugin.serving.latency import HERE
from disagg_plugin.serving.prefix_hash import prefix_hashes
from disagg_policies.estimates import queue_ahead_s, remote_ttft_s
from disagg_policies.snapshots import DecodeState, Prompt

DEFAULT_STEP_TOKENS = 2048


def parameters_of(settings: DisaggSettings, *, step_tokens: int) -> PolicyParameters:
    """What the settings say to the policies.

    Args:
        step_tokens: Prompt tokens of one prefill step of a worker.
    """
    split = settings.split_policy
    return PolicyParameters(
        prompt_length_threshold=split.prompt_length_threshold,
        prefill_queue_max=split.prefill_queue_max,
        min_cache_hit_ratio=settings.cache.min_cache_hit_ratio,
        prefix_cache_weight=split.prefix_cache_weight,
        queue_length_weight=split.queue_length_weight,
        decode_load_weight=split.decode_load_weight,
        link_weight=split.link_weight,
        enable_hotspot_prevention=split.enable_hotspot_prevention,
        decode_harm_weight=split.decode_harm_weight,
        offload_hysteresis=split.offload_hysteresis,
        chunk_tokens=step_tokens,
        suspect_after_s=split.suspect_after_s,
    )


class OffloadDecisions:
    """The decisions of one decode engine; all calls from the scheduler's thread, ``snapshot`` from any.

    Args:
        load: Of this engine, kept by its connector; the decode role tells it of prompts that stay.
        kv_capacity_tokens: Size of the engine's KV cache.
    """

    def __init__(
        self,
        settings: DisaggSettings,
        port: DecodePort,
        load: LoadTracker,
        *,
        engine: str,
        kv_capacity_tokens: int,
        step_tokens: int = DEFAULT_STEP_TOKENS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        policy = settings.policy
        self._port = port
        self._load = load
        self._engine = engine
        self._capacity_tokens = max(1, kv_capacity_tokens)
        self._budget_tokens = int(settings.transfer.held_kv_fraction * kv_capacity_tokens)
        self._step_tokens = step_tokens
        self._decider = Decider(
            choose(load_plugins(policy), policy),
            parameters_of(settings, step_tokens=step_tokens),
            bound_s=policy.hook_timeout_ms / 1e3,
            log_interval_s=policy.log_interval_s,
            clock=clock,
        )
        port.ask_for_codecs(lambda worker, choices: self._decider.choose_codec(worker, choices).name)

    def decide(
        self,
        prompt: PromptView,
        cached_tokens: int,
        *,
        free_tokens: int,
        promised_tokens: int,
        lmcache_tokens: int = 0,
        without: Collection[str] = (),
        hashes: Sequence[int] | None = None,
    ) -> DecisionRecord:
        """Here or elsewhere, and where.

        Args:
            free_tokens: Room in the engine's KV cache.
            promised_tokens: KV that is held here for transfers, or will be.
            lmcache_tokens: Prefix in LMCache, counted from token 0.
            without: Workers that are out of the question.
            hashes: Of the prompt's prefixes, where they are known already.
        """
        if hashes is None:
            hashes = hashes_of(prompt)
        workers = self._port.workers()
        decode = self._state(free_tokens, promised_tokens)
        known = [w.prefill for w in workers if w.prefill.samples]
        if not decode.prefill.samples and known:  # we never prefilled: as fast as they
            decode = replace(decode, prefill=replace(known[0], samples=0))
        if decode.prefill.samples or known:
            self._port.assume(decode.prefill)  # who has measured nothing yet, perhaps since a restart: as fast as we
        overlap_tokens = self._port.overlap_tokens(hashes)
        if without:
            left = [index for index, worker in enumerate(workers) if worker.worker not in without]
            overlap_tokens = tuple([overlap_tokens[index] for index in left if index < len(overlap_tokens)])
            workers = tuple([workers[index] for index in left])
        return self._decider.decide(
            Prompt(
                prompt.request_id,
                len(prompt.token_ids),
                cached_tokens,
                lmcache_tokens,
                priority=prompt.priority,
                only_offload=prompt.only_offload,
            ),
            decode,
            workers,
            overlap_tokens,
        )

    def landed(self, transfer: Transfer) -> None:
        """Learn from a transfer that went well."""
        arrival, record = transfer.arrival, transfer.record
        tokens = transfer.end_token - transfer.first_token
        self._port.landed(transfer.peer, wire_bytes=arrival.wire_bytes if arrival is not None else 0, tokens=tokens)
        if record is None:
            return
        seen = record.snapshot
        for index, worker in enumerate(seen.workers):
            if worker.worker == transfer.peer:
                overlap = seen.overlap_tokens[index] if seen.overlap_tokens else 0
                if queue_ahead_s(worker, seen.prompt.priority) > worker.prefill.seconds(tokens, 0):
                    return  # how far off the queue's estimate was is no overhead: more urgent prompts overtake
                expected_s = remote_ttft_s(seen, worker, overlap, chunk_tokens=self._step_tokens) - worker.overhead_s
                decode = seen.decode
                step_s = decode.decode.seconds(decode.running_decodes + 1, decode.decode_context_tokens)
                took_s = transfer.landed_s - transfer.offered_s
                self._port.saw_overhead(transfer.peer, seconds=took_s - (expected_s - step_s))

    def snapshot(self) -> dict[str, object]:
        """The debug view."""
        return {
            "decision_log": self._decider.rows(),
            "latency_model": self._load.model.snapshot(),
        }

    def policies(self) -> dict[str, object]:
        """Which policies are asked, and how they do."""
        return self._decider.status()

    def close(self) -> None:
        """Let the threads of other people's policies end."""
        self._decider.close()

    def _state(self, free_tokens: int, promised_tokens: int) -> DecodeState:
        load = self._load.load()
        model = self._load.model
        return DecodeState(
            engine=self._engine,
            running_decodes=load.running_decodes,
            decode_context_tokens=load.decode_context_tokens,
            queued_requests=load.queued_requests,
            queued_prefill_tokens=load.queued_prefill_tokens,
            kv_usage=min(1.0, max(0.0, 1 - free_tokens / self._capacity_tokens)),
            held_kv_tokens=promised_tokens,
            held_kv_budget_tokens=self._budget_tokens,
            prefill=model.prefill(HERE),
            decode=model.decode(),
        )


def hashes_of(prompt: PromptView) -> Sequence[int]:
    """Of all prefixes of a prompt, chunk by chunk; none where its ids are only placeholders of the engine's."""
    try:
        return prefix_hashes(prompt.token_ids, salt=prompt.cache_salt, lora=prompt.lora)
    except (OverflowError, TypeError):
        return ()
