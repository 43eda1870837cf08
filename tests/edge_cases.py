"""What is unusual about a request, an engine or a moment, and what happens then: one table for tests and docs.

docs/edge-cases.md is made from it (``python tools/edge_cases_table.py``). The cases with ``fields`` are sent to real
engines by tests/e2e/test_1_edge_cases.py, as they stand here; the others name the tests that show them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """In one phrase."""

    LOCAL = "prefilled locally"
    AS_LOCAL = "offloaded; the answer is a local one's"
    REPAIRED = "repaired in the same request"
    REFUSED = "refused by name; every prompt local"
    WORKS = "offloaded as ever"


@dataclass(frozen=True)
class EdgeCase:
    """One row.

    Attributes:
        fields: Of a completion request with a long prompt.
        reason: Word in ``disagg_decisions_total``, for requests that stay.
    """

    name: str
    outcome: Outcome
    how: str
    tests: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


_STAYS = "tests/e2e/test_1_edge_cases.py::test_a_request_that_cannot_be_offloaded_is_served_where_it_is"
_TRAVELS = "tests/e2e/test_1_edge_cases.py::test_what_shapes_only_the_answer_works_as_without_us"
_VIEWS = "tests/unit/vllm/test_kv_views.py"
_SUPPORT = "tests/unit/vllm/test_support.py"
_ENGINES = "tests/e2e/test_7_edge_engines.py"
_HELD = "tests/unit/control/test_router_flow.py"
_SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


def _stays(name: str, reason: str, how: str, **fields: Any) -> EdgeCase:
    return EdgeCase(name, Outcome.LOCAL, how, (_STAYS,), fields, reason)


def _travels(name: str, how: str = "The decode engine samples; the field does not travel.", **fields: Any) -> EdgeCase:
    return EdgeCase(name, Outcome.AS_LOCAL, how, (_TRAVELS,), fields)


REQUESTS: tuple[EdgeCase, ...] = (
    _stays(
        "prompt_logprobs",
        "prompt_logprobs",
        "They need the forward over the whole prompt on the engine that answers.",
        prompt_logprobs=1,
    ),
    _stays("echo with logprobs", "prompt_logprobs", "vLLM makes prompt logprobs of it.", echo=True, logprobs=2),
    _stays(
        "beam search",
        "beam_search",
        "Each step of a beam is a request of its own whose prompt the engine has just computed.",
        use_beam_search=True,
        n=2,
    ),
    EdgeCase(
        "prompt embeds",
        Outcome.LOCAL,
        "Token ids do not describe the prompt (`prompt_embeds`).",
        (f"{_SUPPORT}::test_requests_that_token_ids_do_not_describe_stay",),
    ),
    EdgeCase(
        "multimodal input",
        Outcome.LOCAL,
        "Token ids do not describe the prompt (`multimodal`).",
        (f"{_SUPPORT}::test_requests_that_token_ids_do_not_describe_stay",),
    ),
    EdgeCase(
        "pooling request",
        Outcome.LOCAL,
        "There is nothing to decode (`pooling`).",
        (f"{_SUPPORT}::test_pooling_requests_stay",),
    ),
    EdgeCase(
        "streaming input",
        Outcome.LOCAL,
        "The prompt grows while it is served (`streaming_input`).",
        (f"{_SUPPORT}::test_requests_whose_prompt_grows_stay",),
    ),
    EdgeCase(
        "prompt + 1 above the prefill engine's limit",
        Outcome.LOCAL,
        "The limit is known from the handshake: no offer and no HTTP call is made.",
        ("tests/unit/control/test_edge_decisions.py::test_a_prompt_that_no_worker_takes_is_not_offered",),
    ),
    _travels("structured output: JSON schema", structured_outputs={"json": _SCHEMA}, max_tokens=24),
    _travels("structured output: regex", structured_outputs={"regex": "[a-c]{12}"}),
    _travels("structured output: choice", structured_outputs={"choice": ["yes", "no"]}),
    _travels("min_tokens", min_tokens=12, ignore_eos=False),
    _travels("logit_bias", logit_bias={"100": 40.0, "200": 39.0}),
    _travels("stop strings", stop=["e", "a"], ignore_eos=False, include_stop_str_in_output=True),
    _travels("stop_token_ids", stop_token_ids=list(range(0, 40_000, 3)), ignore_eos=False),
    _travels("sampling with a seed", seed=7, temperature=0.8),
    _travels("sampling with a seed, top-k, top-p, min-p", seed=8, temperature=1.2, top_k=50, top_p=0.9, min_p=0.01),
    _travels(
        "repetition, presence and frequency penalties",
        "The decode engine knows the prompt's tokens, which they count too.",
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.5,
    ),
    _travels("bad_words", bad_words=["the", " a"]),
    _travels("allowed_token_ids", allowed_token_ids=list(range(300, 900))),
    _travels("n = 3 with a seed", n=3, seed=9, temperature=0.8),
    _travels("echo without logprobs", "The API server puts the prompt's text in front.", echo=True),
    _travels("one output token", max_tokens=1),
    _travels("truncate_prompt_tokens", "What is offered is what is left.", truncate_prompt_tokens=100),
)

ENGINES: tuple[EdgeCase, ...] = (
    EdgeCase(
        "LoRA",
        Outcome.WORKS,
        "By name, and only if the adapter's weights and shape have one digest on both engines; a prefill worker says "
        "nothing and sends nothing before it has compared them.",
        (
            f"{_ENGINES}::test_an_adapter_of_one_name_and_one_digest_is_used",
            "tests/unit/control/test_adapters.py::test_nothing_is_said_or_sent_before_the_adapter_was_compared",
        ),
    ),
    EdgeCase(
        "LoRA with other weights under the same name",
        Outcome.REPAIRED,
        "`adapter_differs`; the decode engine prefills with its own.",
        (f"{_ENGINES}::test_another_adapter_under_the_same_name_is_not_used",),
    ),
    EdgeCase(
        "different block sizes on P and D",
        Outcome.WORKS,
        "What travels depends on no block size.",
        (
            f"{_ENGINES}::test_block_sizes_may_differ",
            "tests/unit/kv/test_edge_caches.py::test_block_size_and_float_dtype_may_differ",
        ),
    ),
    EdgeCase(
        "different float dtypes of the KV cache",
        Outcome.WORKS,
        "Raw chunks travel in the sender's dtype and are converted when they are scattered.",
        ("tests/unit/kv/test_edge_caches.py::test_block_size_and_float_dtype_may_differ",),
    ),
    EdgeCase(
        "fp8 KV cache on both",
        Outcome.WORKS,
        "Bytes travel as they are, whatever codec was asked for; scales are those of the checkpoint, which the weights "
        "digest covers.",
        (
            "tests/unit/kv/test_edge_caches.py::test_an_fp8_cache_travels_byte_by_byte",
            "tests/unit/vllm/test_kv_views.py::test_fp8_caches_are_moved_as_bytes",
        ),
    ),
    EdgeCase(
        "fp8 KV cache on one side, or another fp8 format",
        Outcome.LOCAL,
        "The handshake refuses, naming both (`kv_dtype`).",
        ("tests/unit/kv/test_edge_caches.py::test_quantized_caches_of_two_kinds_are_refused",),
    ),
    EdgeCase(
        "fp8 scales computed at run time, scales inside the cache",
        Outcome.REFUSED,
        "They are not the same on two engines.",
        (
            f"{_SUPPORT}::test_unsupported_engines",
            f"{_SUPPORT}::test_quantized_caches_with_scales_inside_are_unsupported_and_plain_fp8_is_not",
        ),
    ),
    EdgeCase(
        "--api-server-count 2 on D",
        Outcome.WORKS,
        "API servers have no part in transfers.",
        (f"{_ENGINES}::test_every_data_parallel_rank_offloads_over_a_side_channel_and_regions_of_its_own",),
    ),
    EdgeCase(
        "--data-parallel-size 2 on D",
        Outcome.WORKS,
        "Each rank has its own side channel (port + rank) and its own region at every worker.",
        (f"{_ENGINES}::test_every_data_parallel_rank_offloads_over_a_side_channel_and_regions_of_its_own",),
    ),
    EdgeCase(
        "different tensor parallelism on P and D",
        Outcome.WORKS,
        "Each pair of ranks exchanges the heads that both hold; a token has landed when all heads have.",
        (
            "tests/unit/kv/test_lanes.py::test_kv_arrives_whatever_the_tensor_parallelism",
            "tests/e2e/test_8_tensor_parallel.py::test_two_ranks_send_to_one",
            "tests/e2e/test_8_tensor_parallel.py::test_one_rank_sends_to_two",
        ),
    ),
    EdgeCase(
        "sleep mode",
        Outcome.REFUSED,
        "Sleeping takes the KV cache away while transfers may be open.",
        (f"{_SUPPORT}::test_unsupported_engines", f"{_SUPPORT}::test_sleep_and_weight_transfer_are_read"),
    ),
    EdgeCase(
        "routed experts in the answer (`--enable-return-routed-experts`)",
        Outcome.REFUSED,
        "They come from computing the prompt, so it is computed where it is answered.",
        (
            f"{_SUPPORT}::test_unsupported_engines",
            f"{_SUPPORT}::test_a_wish_for_routed_experts_is_read_where_this_vllm_and_an_older_one_have_it",
        ),
    ),
    EdgeCase(
        "a bfloat16 cache of vLLM on a CPU with AMX",
        Outcome.REFUSED,
        "vLLM lays it out for that unit, which we do not know; float32 and float16 caches are moved.",
        (f"{_VIEWS}::test_a_bfloat16_cache_is_moved_unless_the_cpu_has_amx_which_lays_it_out_for_itself",),
    ),
    EdgeCase(
        "weights changed in place (`--weight-transfer-config`)",
        Outcome.REFUSED,
        "The digest of the start would be another model's.",
        (f"{_SUPPORT}::test_unsupported_engines", f"{_SUPPORT}::test_sleep_and_weight_transfer_are_read"),
    ),
    EdgeCase(
        "a scheduled weight update, engine by engine",
        Outcome.LOCAL,
        "A restarted engine has another digest: while old and new run side by side they refuse each other "
        "(`weights_digest`); between equal ones transfers go on.",
        ("tests/e2e/test_3_faults.py::test_a_worker_with_other_weights_is_refused_once_and_never_used",),
    ),
    EdgeCase(
        "pooling model, encoder-decoder, MLA, sliding window, Mamba, pipeline or context parallelism, speculation",
        Outcome.REFUSED,
        "One line at start says which (`disagg_inactive`).",
        (f"{_SUPPORT}::test_unsupported_engines",),
    ),
)

MOMENTS: tuple[EdgeCase, ...] = (
    EdgeCase(
        "preemption on P",
        Outcome.WORKS,
        "The prompt is computed again; what was staged is not sent again.",
        (
            "tests/unit/kv/test_dataplane.py::test_a_preempted_prompt_continues_from_what_was_staged",
            "tests/unit/control/test_prefill_side.py::test_a_preemption_starts_the_export_over",
            f"{_ENGINES}::test_a_prompt_whose_prefill_is_preempted_arrives_all_the_same",
        ),
    ),
    EdgeCase(
        "preemption on D",
        Outcome.LOCAL,
        "The prompt and what was generated are computed where they are (`preempted`).",
        (f"{_SUPPORT}::test_preempted_requests_stay",),
    ),
    EdgeCase(
        "/reset_prefix_cache on D or P while transfers are open",
        Outcome.WORKS,
        'vLLM answers `"success": false` as long as blocks are in use; the transfer goes on. P\'s digest of prefixes '
        "is emptied with its cache.",
        (
            f"{_ENGINES}::test_a_prefix_cache_reset_beside_a_transfer_harms_neither",
            "tests/unit/control/test_service.py::test_prefixes_that_prefill_holds_are_known_to_decode",
        ),
    ),
    EdgeCase(
        "/pause and /resume of D",
        Outcome.WORKS,
        "Requests that were kept go on where they were, or locally if a deadline passed meanwhile. mode=keep needs "
        "clear_cache=false: vLLM clears no cache into which KV is being loaded, and says so with an error.",
        (f"{_ENGINES}::test_a_paused_decode_engine_goes_on_when_resumed",),
    ),
    EdgeCase(
        "/pause of P",
        Outcome.REPAIRED,
        "mode=abort ends its requests, which the decode engine hears at once (`prefill_aborted`). mode=keep sends what "
        "is computed and comes to rest; what is begun goes on after /resume, or is repaired after `stall_timeout_s`. "
        "What comes while it is paused is handed back when it has made no step for 2 s (`prefill_paused`), and nothing "
        "is offered to it until it computes (`draining`). It is tried again 10 s after nothing waits, or after 60 s.",
        (
            f"{_ENGINES}::test_a_paused_prefill_engine_hands_its_prompts_back",
            f"{_ENGINES}::test_what_comes_to_a_paused_prefill_engine_is_not_kept_waiting",
            "tests/unit/control/test_standstill.py::test_a_free_engine_that_leaves_a_prompt_in_its_queue_is_at_rest",
            "tests/unit/control/test_prefill_side.py::test_a_prompt_that_the_engine_is_to_compute_asks_for_no_steps",
        ),
    ),
    EdgeCase(
        "SIGTERM to P, with vLLM's --shutdown-timeout or on SGLang",
        Outcome.REPAIRED,
        "P takes no more prompts, hands back what it has not begun, and leaves when the rest is sent (`draining`).",
        ("tests/e2e/test_3_faults.py::test_a_prefill_worker_that_is_told_to_leave_ends_what_it_has_begun",),
    ),
    EdgeCase(
        "SIGTERM to P, vLLM's default",
        Outcome.REPAIRED,
        "vLLM kills its engine process at once: as if P were killed.",
        (
            f"{_ENGINES}::test_a_prefill_engine_that_is_told_to_leave_hands_back_and_leaves",
            "tests/e2e/test_3_faults.py::test_a_prefill_worker_that_dies_while_streaming_costs_only_time",
        ),
    ),
    EdgeCase(
        "POST /disagg/drain at P, then DELETE",
        Outcome.LOCAL,
        "As with SIGTERM, but P stays: prompts go elsewhere (`draining`) until it takes them again.",
        ("tests/e2e/test_3_faults.py::test_a_prefill_worker_that_drains_is_not_asked_until_it_takes_prompts_again",),
        reason="draining",
    ),
    EdgeCase(
        "SIGTERM to D",
        Outcome.WORKS,
        "Its requests end as vLLM ends them; P gives up what was for it and holds nothing.",
        ("tests/e2e/test_8_tensor_parallel.py::test_a_decode_engine_that_leaves_costs_prefill_nothing",),
    ),
    EdgeCase(
        "a router's lease ends before D asks",
        Outcome.REPAIRED,
        "P's blocks are free and nothing is sent from them; D computes (`refused_hold_expired`).",
        (
            f"{_ENGINES}::test_a_lease_that_ended_costs_a_local_prefill",
            f"{_HELD}::test_who_comes_after_the_lease_is_told_so_and_gets_nothing",
        ),
    ),
    EdgeCase(
        "a router's request that names a host which nobody allowed",
        Outcome.LOCAL,
        "Nothing is connected to (`unknown_holder`).",
        ("tests/e2e/test_1_router.py::test_a_host_that_nobody_allowed_is_not_connected_to",),
    ),
    EdgeCase(
        "16 requests with one long system prompt at once",
        Outcome.WORKS,
        "The first one's transfer serves all; the others wait for it, with a deadline.",
        ("tests/e2e/test_1_shared_prefix.py::test_one_long_system_prompt_travels_once",),
    ),
)

EDGE_CASES = (*REQUESTS, *ENGINES, *MOMENTS)
