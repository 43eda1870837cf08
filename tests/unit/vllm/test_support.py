"""What we cannot move is served locally, for a reason that a person understands."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from disagg_vllm.support import (
    ROUTING_KEY,
    EngineFacts,
    dp_rank_of,
    engine_facts,
    http_dp_rank_of,
    local_only_reason,
    routing_of,
    unsupported_engine,
    unsupported_reason,
)

# torch's own, when vLLM imports its compiler
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

SUPPORTED = EngineFacts()


def test_full_attention_on_one_pipeline_stage_is_supported():
    assert unsupported_reason(SUPPORTED) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"cache_groups": 2}, "2 groups", id="groups"),
        pytest.param({"spec_kinds": frozenset({"full_attention", "mamba"})}, "mamba", id="mamba"),
        pytest.param({"spec_kinds": frozenset({"mla_attention"})}, "mla_attention", id="MLA"),
        pytest.param({"same_in_all_layers": False}, "differ in shape", id="layers differ"),
        pytest.param({"window": 4096}, "4096", id="window"),
        pytest.param({"bidirectional": True}, "both directions", id="bidirectional"),
        pytest.param({"value_head_dim": 64}, "64 dimensions", id="narrow values"),
        pytest.param({"packed": "int8_per_token_head"}, "int8_per_token_head", id="packed"),
        pytest.param({"partial_prefill_layers": True}, "kv_sharing_fast_prefill", id="fast prefill"),
        pytest.param({"pipeline_parallel": 2}, "pipeline parallelism is 2", id="pipeline"),
        pytest.param({"context_parallel": 4}, "context parallelism is 4", id="context"),
        pytest.param({"speculative_method": "eagle"}, "eagle", id="speculative"),
        pytest.param({"encoder_decoder": True}, "encoder-decoder", id="encoder-decoder"),
        pytest.param({"generates": False}, "pooling", id="pooling"),
        pytest.param({"sleeps": True}, "sleep mode", id="sleep mode"),
        pytest.param({"weights_change": True}, "weight_transfer_config", id="weights change"),
        pytest.param({"returns_routed_experts": True}, "enable_return_routed_experts", id="routed experts"),
    ],
)
def test_unsupported_engines(change, said):
    reason = unsupported_reason(replace(SUPPORTED, **change))
    assert reason is not None
    assert said in reason


def real_engine(tmp_path: Path, *, spec_class: str = "FullAttentionSpec", groups: int = 1, spec=None, **changes):
    """A VllmConfig of a tiny model, as ``vllm serve`` makes it, and a KV cache config with vLLM's own specs."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1 import kv_cache_interface as kv

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    vllm_config = EngineArgs(
        model=str(tmp_path), dtype="float32", skip_tokenizer_init=True, load_format="dummy", **changes
    ).create_engine_config()
    fields = {"block_size": 128, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32, **(spec or {})}
    layers = [f"model.layers.{n}.self_attn.attn" for n in range(4)]
    one = kv.KVCacheGroupSpec(layers, getattr(kv, spec_class)(**fields))
    return vllm_config, kv.KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=[one] * groups)


def test_a_stock_engine_is_supported(tmp_path):
    assert engine_facts(*real_engine(tmp_path)) == EngineFacts(head_dim=64, value_head_dim=64)


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        pytest.param({"groups": 2}, "2 groups", id="groups"),
        pytest.param({"spec_class": "SlidingWindowSpec", "spec": {"sliding_window": 64}}, "sliding_window", id="SWA"),
        pytest.param({"spec": {"sliding_window": 64}}, "window of 64", id="SWA kept in full"),
        pytest.param({"spec": {"attention_chunk_size": 96}}, "window of 96", id="chunked, kept in full"),
        pytest.param({"spec_class": "MLAAttentionSpec", "spec": {"num_kv_heads": 1}}, "mla_attention", id="MLA"),
        pytest.param({"spec_class": "RSWASpec", "spec": {"rswa_window": 8}}, "RSWASpec", id="R-SWA"),
        pytest.param({"spec": {"head_size_v": 32}}, "32 dimensions", id="narrow values"),
        pytest.param({"spec": {"page_size_padded": 1 << 20}}, "page_size_padded", id="padded pages"),
        pytest.param({"spec": {"non_causal": True}}, "both directions", id="bidirectional"),
    ],
)
def test_vllms_own_specs_are_told_apart(engine, said, tmp_path):
    reason = unsupported_engine(*real_engine(tmp_path, **engine))
    assert reason is not None
    assert said in reason


def test_quantized_caches_with_scales_inside_are_unsupported_and_plain_fp8_is_not(tmp_path):
    from vllm.v1.kv_cache_interface import KVQuantMode

    fp8 = {"dtype": torch.uint8, "kv_quant_mode": KVQuantMode.FP8_PER_TENSOR}
    assert unsupported_engine(*real_engine(tmp_path, spec=fp8)) is None
    packed = {"dtype": torch.int8, "kv_quant_mode": KVQuantMode.INT8_PER_TOKEN_HEAD}
    assert "int8_per_token_head" in str(unsupported_engine(*real_engine(tmp_path, spec=packed)))


def test_bundled_specs_of_one_shape_are_supported_and_of_two_are_not(tmp_path):
    from vllm.v1 import kv_cache_interface as kv

    vllm_config, kv_cache_config = real_engine(tmp_path)
    small = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    for other, said in ((small, None), (replace(small, head_size=128), "differ in shape")):
        bundle = kv.UniformTypeKVCacheSpecs(block_size=128, kv_cache_specs={"layers.0": small, "layers.1": other})
        kv_cache_config.kv_cache_groups = [kv.KVCacheGroupSpec(["layers.0", "layers.1"], bundle)]
        reason = unsupported_engine(vllm_config, kv_cache_config)
        assert (reason is None) if said is None else (said in str(reason))


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        pytest.param("parallel_config", {"pipeline_parallel_size": 2}, "pipeline", id="pipeline"),
        pytest.param("parallel_config", {"decode_context_parallel_size": 2}, "context", id="decode context"),
        pytest.param("parallel_config", {"prefill_context_parallel_size": 2}, "context", id="prefill context"),
        pytest.param("model_config", {"runner_type": "pooling"}, "pooling", id="pooling"),
        pytest.param("cache_config", {"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill", id="fast prefill"),
    ],
)
def test_vllms_settings_are_read(section, change, said, tmp_path):
    vllm_config, kv_cache_config = real_engine(tmp_path)
    for name, value in change.items():
        assert hasattr(getattr(vllm_config, section), name)
        setattr(getattr(vllm_config, section), name, value)
    assert said in str(unsupported_engine(vllm_config, kv_cache_config))


def test_speculative_decoding_is_read(tmp_path):
    vllm_config, kv_cache_config = real_engine(tmp_path)
    vllm_config.speculative_config = SimpleNamespace(method="ngram")
    assert "ngram" in str(unsupported_engine(vllm_config, kv_cache_config))


def test_sleep_and_weight_transfer_are_read(tmp_path):
    vllm_config, kv_cache_config = real_engine(tmp_path)
    assert hasattr(vllm_config.model_config, "enable_sleep_mode")
    assert hasattr(vllm_config, "weight_transfer_config")
    vllm_config.model_config.enable_sleep_mode = True
    assert "sleep mode" in str(unsupported_engine(vllm_config, kv_cache_config))
    vllm_config.model_config.enable_sleep_mode = False
    vllm_config.weight_transfer_config = SimpleNamespace(backend="nccl")
    assert "weight_transfer_config" in str(unsupported_engine(vllm_config, kv_cache_config))


def test_a_wish_for_routed_experts_is_read_where_this_vllm_and_an_older_one_have_it(tmp_path):
    vllm_config, kv_cache_config = real_engine(tmp_path)
    assert vllm_config.aux_output_config.enable_return_routed_experts is False
    vllm_config.aux_output_config = SimpleNamespace(enable_return_routed_experts=True)
    assert "enable_return_routed_experts" in str(unsupported_engine(vllm_config, kv_cache_config))
    vllm_config.aux_output_config = None
    vllm_config.model_config.enable_return_routed_experts = True  # vLLM 0.30
    assert "enable_return_routed_experts" in str(unsupported_engine(vllm_config, kv_cache_config))


@pytest.mark.parametrize(
    ("parallel", "rank", "by_http"),
    [
        pytest.param({"data_parallel_rank": 0}, 0, 0, id="an older vLLM, no data parallelism"),
        pytest.param({"data_parallel_rank": 0, "data_parallel_index": 1}, 1, 1, id="second rank of a dense model"),
        pytest.param({"data_parallel_rank": 3, "data_parallel_index": 3}, 3, 3, id="fourth rank of an MoE model"),
        pytest.param(
            {"data_parallel_rank": 0, "data_parallel_index": 2, "data_parallel_external_lb": True},
            *(2, None),
            id="an API server for each rank",
        ),
        pytest.param(
            {
                "data_parallel_rank": 0,
                "data_parallel_index": 5,
                "data_parallel_hybrid_lb": True,
                "data_parallel_rank_local": 1,
            },
            *(5, 1),
            id="an API server for each machine",
        ),
    ],
)
def test_data_parallel_ranks_are_told_apart(parallel, rank, by_http):
    """vLLM makes every rank of a dense model believe that it is rank 0; side channels need the real one."""
    from vllm.config import ParallelConfig

    names = set(ParallelConfig.__dataclass_fields__)
    assert parallel.keys() <= names | {"data_parallel_index"}
    config = SimpleNamespace(**parallel)
    assert (dp_rank_of(config), http_dp_rank_of(config)) == (rank, by_http)


def real_request(**changes):
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    sampling = SamplingParams(max_tokens=4, **changes.pop("sampling", {}))
    arguments = {"prompt_token_ids": [1, 2, 3], "sampling_params": sampling, "pooling_params": None, **changes}
    return Request(**{"request_id": "r", **arguments})


def test_an_ordinary_request_may_be_offloaded():
    assert local_only_reason(real_request()) is None
    assert local_only_reason(real_request(sampling={"logprobs": 5, "n": 1, "seed": 7})) is None


def test_requests_that_need_the_whole_prompts_forward_stay():
    assert local_only_reason(real_request(sampling={"prompt_logprobs": 0})) == "prompt_logprobs"
    assert local_only_reason(real_request(sampling={"skip_reading_prefix_cache": True})) == "no_prefix_cache"


@pytest.mark.parametrize("request_id", ["cmpl-1f-0-9ab3-beam-0", "cmpl-1f-0-9ab3-beam-11-aa3d1ea1"])
def test_the_steps_of_a_beam_stay(request_id):
    assert local_only_reason(real_request(request_id=request_id)) == "beam_search"
    assert local_only_reason(real_request(request_id=request_id.replace("-beam-", "-beams-"))) is None


def test_requests_that_token_ids_do_not_describe_stay():
    embeds = torch.zeros(3, 8)
    assert local_only_reason(real_request(prompt_token_ids=None, prompt_embeds=embeds)) == "prompt_embeds"
    mixed = real_request(prompt_embeds=embeds, prompt_is_token_ids=[True, False, True])
    assert local_only_reason(mixed) == "prompt_embeds"
    assert local_only_reason(real_request(mm_features=[object()])) == "multimodal"


def test_admission_may_keep_a_request_here_or_want_it_elsewhere():
    never = real_request(sampling={"extra_args": {ROUTING_KEY: "never_offload"}})
    only = real_request(sampling={"extra_args": {ROUTING_KEY: "only_offload"}})
    assert local_only_reason(never) == "degraded"
    assert (local_only_reason(only), routing_of(only)) == (None, "only_offload")
    assert routing_of(real_request(sampling={"extra_args": {ROUTING_KEY: ["nonsense"]}})) is None


def test_pooling_requests_stay():
    from vllm.pooling_params import PoolingParams

    assert local_only_reason(real_request(sampling_params=None, pooling_params=PoolingParams())) == "pooling"


def test_requests_whose_prompt_grows_stay():
    assert local_only_reason(real_request(resumable=True)) == "streaming_input"


def test_preempted_requests_stay():
    generating = real_request()
    generating.append_output_token_ids(5)
    assert local_only_reason(generating) == "preempted"
    interrupted = real_request()
    interrupted.num_preemptions = 1
    assert local_only_reason(interrupted) == "preempted"
