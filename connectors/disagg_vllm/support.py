"""What of a vLLM engine, and of a request to it, we can move. What is not supported is served locally."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from disagg_policies.admission_snapshots import NEVER_OFFLOAD, ONLY_OFFLOAD

BEAM_REQUEST = re.compile(r"-beam-\d+(-[0-9a-f]+)?$")  # how vLLM names the one-token steps of a beam
ROUTING_KEY = "disagg_routing"  # in a request's extra_args; set where it is queued


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What decides whether one engine's KV can be transferred; made by ``engine_facts``.

    Attributes:
        spec_kinds: What kinds of KV the layers keep, as vLLM names them.
        packed: What in the cache's layout goes beyond one K and one V vector per token and head, or "".
        window: Sliding window or attention chunk of a layer that keeps all its tokens none the less.
    """

    cache_groups: int = 1
    spec_kinds: frozenset[str] = frozenset({"full_attention"})
    same_in_all_layers: bool = True
    head_dim: int = 128
    value_head_dim: int = 128
    packed: str = ""
    window: int | None = None
    bidirectional: bool = False
    pipeline_parallel: int = 1
    context_parallel: int = 1
    speculative_method: str = ""
    encoder_decoder: bool = False
    generates: bool = True
    partial_prefill_layers: bool = False
    sleeps: bool = False
    weights_change: bool = False
    returns_routed_experts: bool = False


def unsupported_reason(facts: EngineFacts) -> str | None:
    """Why this engine takes no part, as the end of a sentence that begins with "because"; None if it does."""
    other_kinds = sorted(facts.spec_kinds - {"full_attention"})
    checks = (
        (not facts.generates, "it serves a pooling model"),
        (facts.encoder_decoder, "the model is an encoder-decoder"),
        (bool(other_kinds), f"the model has layers of kind {', '.join(other_kinds)}, not full attention"),
        (facts.cache_groups != 1, f"the KV cache has {facts.cache_groups} groups, not one"),
        (not facts.same_in_all_layers, "the layers' KV caches differ in shape"),
        (facts.window is not None, f"attention is limited to a window of {facts.window} tokens"),
        (facts.bidirectional, "prompts are attended to in both directions"),
        (
            facts.value_head_dim != facts.head_dim,
            f"values have {facts.value_head_dim} dimensions, not {facts.head_dim}",
        ),
        (bool(facts.packed), f"the KV cache is packed ({facts.packed})"),
        (facts.partial_prefill_layers, "kv_sharing_fast_prefill leaves layers of a prompt out"),
        (facts.sleeps, "sleep mode is enabled: it takes the KV cache away under open transfers"),
        (facts.weights_change, "weight_transfer_config is set: weights that change in place are no model's KV"),
        (facts.returns_routed_experts, "enable_return_routed_experts wants each prompt computed where it is answered"),
        (facts.pipeline_parallel > 1, f"pipeline parallelism is {facts.pipeline_parallel}"),
        (facts.context_parallel > 1, f"context parallelism is {facts.context_parallel}"),
        (bool(facts.speculative_method), f"speculative decoding ({facts.speculative_method}) keeps KV of its own"),
    )
    return next((reason for holds, reason in checks if holds), None)


def unsupported_engine(vllm_config: Any, kv_cache_config: Any) -> str | None:
    """``unsupported_reason`` of a vLLM engine."""
    return unsupported_reason(engine_facts(vllm_config, kv_cache_config))


def engine_facts(vllm_config: Any, kv_cache_config: Any) -> EngineFacts:
    """Read vLLM's configuration; what an older or newer vLLM does not have counts as not used."""
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    groups = list(kv_cache_config.kv_cache_groups)
    specs = [spec for group in groups for spec in _layer_specs(group.kv_cache_spec)]
    first = specs[0] if specs else None
    speculative = vllm_config.speculative_config
    return EngineFacts(
        cache_groups=len(groups),
        spec_kinds=frozenset(_kind(spec) for spec in specs),
        same_in_all_layers=all(_shape(spec) == _shape(first) for spec in specs),
        head_dim=getattr(first, "head_size", 0),
        value_head_dim=getattr(first, "head_size_v", 0),
        packed=next((reason for reason in map(_packing, specs) if reason), ""),
        window=next((window for window in map(_window, specs) if window is not None), None),
        bidirectional=any(getattr(spec, "non_causal", False) for spec in specs),
        pipeline_parallel=parallel.pipeline_parallel_size,
        context_parallel=max(
            getattr(parallel, "decode_context_parallel_size", 1), getattr(parallel, "prefill_context_parallel_size", 1)
        ),
        speculative_method=str(getattr(speculative, "method", None) or "unnamed") if speculative else "",
        encoder_decoder=bool(getattr(model, "is_encoder_decoder", False)),
        generates=getattr(model, "runner_type", "generate") == "generate",
        partial_prefill_layers=bool(getattr(cache, "kv_sharing_fast_prefill", False)),
        sleeps=bool(getattr(model, "enable_sleep_mode", False)),
        weights_change=getattr(vllm_config, "weight_transfer_config", None) is not None,
        returns_routed_experts=any(
            getattr(config, "enable_return_routed_experts", False)  # vLLM 0.30 has it in the model's
            for config in (getattr(vllm_config, "aux_output_config", None), model)
        ),
    )


def dp_rank_of(parallel: Any) -> int:
    """The data-parallel rank of this scheduler process. vLLM sets ``data_parallel_rank`` of dense models back to 0."""
    return int(getattr(parallel, "data_parallel_index", None) or parallel.data_parallel_rank)


def http_dp_rank_of(parallel: Any) -> int | None:
    """By what number this engine's API server knows this rank; None where it knows no other one."""
    if getattr(parallel, "data_parallel_external_lb", False):
        return None
    if getattr(parallel, "data_parallel_hybrid_lb", False):
        return int(getattr(parallel, "data_parallel_rank_local", None) or 0)
    return dp_rank_of(parallel)


def local_only_reason(request: Any) -> str | None:
    """Why this request's prompt must be prefilled where it is, as a word for counters; None if it need not be."""
    sampling = request.sampling_params
    checks = (
        ("pooling", request.pooling_params is not None or sampling is None),
        ("prompt_embeds", request.prompt_embeds is not None or request.prompt_token_ids is None),
        ("multimodal", bool(request.mm_features)),
        ("beam_search", BEAM_REQUEST.search(request.request_id) is not None),
        ("prompt_logprobs", sampling is not None and sampling.prompt_logprobs is not None),
        ("no_prefix_cache", bool(getattr(request, "skip_reading_prefix_cache", False))),
        ("streaming_input", bool(getattr(request, "resumable", False))),
        ("degraded", routing_of(request) == NEVER_OFFLOAD),
        ("preempted", request.num_preemptions > 0 or request.num_output_tokens > 0),
    )
    return next((reason for reason, holds in checks if holds), None)


def routing_of(request: Any) -> str | None:
    """Which way of prefilling admission chose for a request it degraded, or None."""
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    value = extra.get(ROUTING_KEY)
    return value if value in (NEVER_OFFLOAD, ONLY_OFFLOAD) else None


def _layer_specs(spec: Any) -> Iterable[Any]:
    """A group's spec may be a bundle of its layers' specs."""
    bundled = getattr(spec, "kv_cache_specs", None)
    return bundled.values() if isinstance(bundled, dict) else (spec,)


def _kind(spec: Any) -> str:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_cache_spec_kind

    if type(spec) is FullAttentionSpec:
        return "full_attention"
    kind = str(get_kv_cache_spec_kind(spec).value)
    return type(spec).__name__ if kind == "full_attention" else kind  # a subclass has its reason to be one


def _shape(spec: Any) -> tuple[object, ...]:
    names = ("block_size", "num_kv_heads", "head_size", "head_size_v", "dtype", "kv_quant_mode")
    return tuple(getattr(spec, name, None) for name in names)


def _window(spec: Any) -> int | None:
    window = getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
    return None if window is None else int(window)


def _packing(spec: Any) -> str:
    """Scales or codes beside K and V, several states a slot, and the like."""
    mode = getattr(spec, "kv_quant_mode", None)
    name = getattr(mode, "name", "NONE")
    if name not in ("NONE", "FP8_PER_TENSOR"):
        return str(name).lower()
    for attribute in ("num_head_slots", "state_content_bytes", "page_size_padded"):
        if getattr(spec, attribute, None) is not None:
            return attribute
    return "" if getattr(spec, "tokens_per_state", 1) == 1 else "tokens_per_state"
