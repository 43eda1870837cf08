"""What of a request to an SGLang engine we can move. What is not supported is prefilled where it is."""

from typing import Any

from disagg_policies.admission_snapshots import NEVER_OFFLOAD, ONLY_OFFLOAD

ROUTING_KEY = "disagg_routing"  # in a request's custom_params: degradation, from the API process to the scheduler


def local_only_reason(req: Any) -> str | None:
    """Why this request's prompt must be prefilled here, as a word for counters; None if it need not be."""
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    checks = (
        ("health_check", req.rid.startswith(HEALTH_CHECK_RID_PREFIX) or req.bootstrap_host == FAKE_BOOTSTRAP_HOST),
        ("rejected", req.finished() or req.to_finish is not None),
        (NEVER_OFFLOAD, routing_of(req) == NEVER_OFFLOAD),
        ("input_embeds", req.input_embeds is not None or req.positional_embed_overrides is not None),
        ("multimodal", req.multimodal_inputs is not None),
        ("prompt_logprobs", req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids)),
        ("prompt_hidden_states", bool(req.return_hidden_states) or bool(req.return_routed_experts)),
        ("session", req.session is not None),
        ("lora", req.lora_id is not None),
        ("extra_key", bool(req.extra_key)),
        ("token_types", req.token_type_ids is not None),
        ("no_prefix_cache", bool(req.skip_radix_cache_insert)),
    )
    return next((reason for reason, holds in checks if holds), None)


def routing_of(req: Any) -> str | None:
    """``never_offload`` or ``only_offload`` where admission degraded the request to that, else None."""
    value = (req.sampling_params.custom_params or {}).get(ROUTING_KEY)
    return value if value in (NEVER_OFFLOAD, ONLY_OFFLOAD) else None
